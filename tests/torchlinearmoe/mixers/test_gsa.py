"""Gated slot attention: its gate's precision, its slots, its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixer_cases import Case, make_stack, random_inputs, small_model

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.mixers.gsa import GSA, Options


def test_a_slot_that_hardly_forgets_still_writes_what_it_forgets():
    """1 - exp(g) of a small g has no digits left in float32; -expm1(g) has all."""
    mixer = make_stack(Case("gsa", {"slots": 3}), dtype=torch.float32).layers[0]
    log_decay = torch.full((4, 6), -1e-6)
    parts = {name: torch.zeros(4, 64) for name in "qkv"}
    s = mixer.features(parts, log_decay)[3]  # pyright: ignore
    torch.testing.assert_close(s, torch.full((4, 2, 3), 1e-6), rtol=1e-5, atol=0)


def test_gates_are_float32_beside_bfloat16_activations():
    mixer: Any = make_stack(Case("gsa", {}), dtype=torch.bfloat16).layers[0]
    parts = mixer.project(random_inputs(9, dtype=torch.bfloat16))
    assert {x.dtype for x in parts.values()} == {torch.bfloat16}
    log_decay = mixer.log_decay(parts["f"])
    assert log_decay.dtype == torch.float32 and bool((log_decay < 0).all())


def test_grouped_heads_keep_one_set_of_slots_a_group():
    spec = make_stack(Case("gsa", {"heads": 4, "head_dim": 16, "kv_heads": 2, "slots": 7})).layers[0].state_spec()
    assert (spec["slot_keys"].shape, spec["slot_values"].shape) == ((2, 16, 7), (2, 7, 16))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"slots": 0}, "mixer.gsa.slots = 0: must be at least 1"),
        ({"slots": -4}, "mixer.gsa.slots = -4: must not be negative"),
        ({"heads": 4, "kv_heads": 3}, "mixer.gsa.kv_heads = 3: must divide the 4 query heads"),
        ({"gate_normalizer": -1.0}, "mixer.gsa.gate_normalizer = -1.0: must be positive"),
        ({"expand_k": 0.01}, "mixer.gsa.expand_k = 0.01: must make whole channels"),
        ({"expand_v": 0.01}, "mixer.gsa.expand_v = 0.01: must make whole channels"),
    ],
)
def test_refuses_in_one_line(wrong, message):
    with pytest.raises(RecipeError) as error:
        GSA.check(Options(**wrong), small_model())
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
