"""MLA: what it keeps of a token, steps that never expand the latent, YaRN's factor of the scores."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mixer_cases import Case, make_stack, random_inputs, relative

from torchlinearmoe.mixers.base import Carry
from torchlinearmoe.mixers.mla import MLA

YARN: dict[str, Any] = {
    "rope_scaling": "yarn",
    "rope_factor": 8.0,
    "rope_original_length": 32,
    "rope_beta_fast": 8.0,
    "rope_mscale": 0.7,
    "rope_mscale_all_dim": 0.9,
}


def test_a_token_keeps_its_latent_and_one_rotated_key():
    mixer = make_stack(Case("mla", {})).layers[0]
    assert {name: spec.shape for name, spec in mixer.state_spec().items()} == {"latent": (512,), "rope_key": (64,)}
    assert {spec.carry for spec in mixer.state_spec().values()} == {Carry.APPEND}


@pytest.mark.parametrize("scaling", [{}, YARN], ids=["plain", "yarn"])
def test_steps_over_the_latent_equal_the_parallel_forward(scaling: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    stack, x_TD = make_stack(Case("mla", MLA.variants[1]), **scaling), random_inputs(70)
    with torch.no_grad():
        expected = stack.packed(x_TD, [70])
        _, states = stack.resumed(x_TD[:40], [40], [0], stack.empty(1, 80))
        monkeypatch.setattr(MLA, "expand", None)  # keys and values of the past are not made again
        for t in range(40, 70):
            y_TD, states = stack.step(x_TD[t : t + 1], t, states)
            assert relative(y_TD, expected[t : t + 1]) < 1e-10


def test_yarn_multiplies_the_scores_by_mscale_squared():
    scales = []
    for more in ({}, YARN):
        mixer = make_stack(Case("mla", MLA.variants[0]), **more).layers[0]
        assert isinstance(mixer, MLA)
        scales.append(mixer.scale)
    assert scales[1] == pytest.approx(scales[0] * (0.09 * math.log(8) + 1) ** 2)
