"""Gated linear attention: its gate's precision and bound, its grouped heads, its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixer_cases import Case, make_stack, random_inputs, small_model

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.mixers.gla import GLA, Options


def test_log_decays_are_float32_beside_bfloat16_activations():
    mixer: Any = make_stack(Case("gla", {}), dtype=torch.bfloat16).layers[0]
    parts = mixer.project(random_inputs(9, dtype=torch.bfloat16))
    assert {x.dtype for x in parts.values()} == {torch.bfloat16}
    log_decay = mixer.log_decay(parts["decay"])
    assert log_decay.dtype == torch.float32 and bool((log_decay < 0).all())


def test_a_bound_of_the_variants_is_met_and_not_always():
    (bounded,) = (options for options in GLA.variants if "clamp_min" in options)
    mixer: Any = make_stack(Case("gla", bounded)).layers[0]
    log_decay = mixer.log_decay(mixer.project(random_inputs(60))["decay"]).detach()
    assert float(log_decay.min()) == bounded["clamp_min"]
    assert 0.1 < float((log_decay == bounded["clamp_min"]).double().mean()) < 0.9


def test_grouped_heads_keep_one_state_a_group():
    mixer = make_stack(Case("gla", {"heads": 4, "head_dim": 16, "kv_heads": 2})).layers[0]
    assert mixer.state_spec()["recurrent"].shape == (2, 8, 16)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"heads": 4, "kv_heads": 3}, "mixer.gla.kv_heads = 3: must divide the 4 query heads"),
        ({"gate_rank": 0}, "mixer.gla.gate_rank = 0: must be at least 1"),
        ({"gate_normalizer": 0.0}, "mixer.gla.gate_normalizer = 0.0: must be positive"),
        ({"clamp_min": 0.0}, "mixer.gla.clamp_min = 0.0: must be below zero"),
        ({"expand_k": 0.01}, "mixer.gla.expand_k = 0.01: must make whole channels"),
        ({"expand_v": 0.01}, "mixer.gla.expand_v = 0.01: must make whole channels"),
    ],
)
def test_refuses_in_one_line(wrong, message):
    with pytest.raises(RecipeError) as error:
        GLA.check(Options(**wrong), small_model())
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
