"""Every mixer has the parameters that its closed formula counts, at every option, width and size of a family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixer_cases import CASES, Case, make_stack, small_model
from parameter_formulas import LAYER, NOT_IN_FIRST, WRITES

from torchlinearmoe.families import FAMILIES
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.mixers.base import LayerPlace
from torchlinearmoe.mixers.linear_mixer import LinearMixer
from torchlinearmoe.models.layer_mixers import layer_mixers
from torchlinearmoe.recipe import resolve

COUNTED = [case for case in CASES if case.name in LAYER]
SIZES = [(family, size) for family in FAMILIES for size in FAMILIES[family].presets if size != "debug"]


def of_layer(layer: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


@pytest.mark.parametrize("case", COUNTED, ids=str)
def test_the_formula_counts_the_parameters(case: Case):
    narrow: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 16}
    for dims in ({}, narrow):
        first, later = map(of_layer, make_stack(case, **dims).layers)
        missing = NOT_IN_FIRST[case.name](case.options, small_model(**dims)) if case.name in NOT_IN_FIRST else 0
        assert LAYER[case.name](case.options, small_model(**dims)) == later == first + missing


@pytest.mark.parametrize("case", [case for case in COUNTED if issubclass(case.mixer, LinearMixer)], ids=str)
def test_the_formula_counts_what_a_token_writes_by(case: Case):
    layer = make_stack(case).layers[0]
    assert isinstance(layer, LinearMixer)
    names = {name for layers in layer.writes.values() for name in layers}
    written = sum(of_layer(layer.get_submodule(name)) for name in names)
    assert WRITES[case.name](case.options, small_model()) == written


@pytest.mark.parametrize(("family", "size"), SIZES)
def test_every_mixer_fits_every_size_as_its_formula_counts(family: str, size: str):
    model = {"family": family, "size": size, "mixers": MIXERS.names()}
    recipe = resolve({"model": model, "training": {"steps": 1}}).model
    for name in dict.fromkeys(layer_mixers(recipe)):
        with torch.device("meta"):
            mixer = MIXERS[name](recipe.mixer_options[name], recipe, LayerPlace(1, 1, 2))
        assert name not in LAYER or of_layer(mixer) == LAYER[name](recipe.mixer_options[name], recipe), name
