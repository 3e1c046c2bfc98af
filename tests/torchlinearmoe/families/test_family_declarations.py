"""A family that leaves a dimension out is refused where it is declared, by the size and the key."""

from __future__ import annotations

import dataclasses

import pytest

from torchlinearmoe.families import FAMILIES


def test_a_size_without_a_dimension_is_refused():
    family = FAMILIES["mixtral"]
    common = {key: value for key, value in family.common.items() if key != "norm_eps"}
    with pytest.raises(ValueError, match=r"^family 'mixtral', size 'debug': no model\.norm_eps$"):
        dataclasses.replace(family, common=common)
    presets = {**family.presets, "new": ({"hidden_size": 64}, {})}
    with pytest.raises(ValueError, match=r"^family 'mixtral', size 'new': no model\.num_layers$"):
        dataclasses.replace(family, presets=presets)
