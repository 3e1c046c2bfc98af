"""Gated linear attention against its paper, its gate's precision, its grouped heads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from definitions import MAPS, cases_of, check_definition, heads_slice, project, rms, sigmoid, swish
from mixer_cases import Case, Dims, make_stack, random_inputs
from torch import Tensor

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.mixers.gla import GLA, Options


@cases_of("gla")
def test_equals_the_paper(case: Case):
    options = case.options
    heads, width = options.heads or 2, options.head_dim or 32
    key_width, value_width = round(width * options.expand_k), round(width * options.expand_v)
    groups = options.kv_heads or heads

    def formula(weights: dict[str, Tensor], x_TD: Tensor) -> Tensor:
        q, k, v = (project(weights, name, x_TD) for name in "qkv")
        if options.conv:
            q, k, v = swish(q), swish(k), swish(v)
        q, k = (MAPS[options.feature_map](x) for x in (q, k))
        gate = x_TD @ weights["g_proj.weight"].T
        low_rank = x_TD @ weights["decay_down.weight"].T
        logits = low_rank @ weights["decay_up.weight"].T + weights["decay_up.bias"]
        alpha = sigmoid(logits) ** (1 / options.gate_normalizer)
        if options.clamp_min is not None:
            alpha = torch.maximum(alpha, torch.tensor(math.exp(options.clamp_min), dtype=torch.float64))
            share = float((alpha == alpha.min()).double().mean())
            assert x_TD.shape[0] < 60 or 0.1 < share < 0.9, "the bound is to be met, and not always"
        y = torch.zeros_like(gate)
        for h in range(heads):
            group = h * groups // heads
            key, value = heads_slice(group, key_width), heads_slice(group, value_width)
            s, query = heads_slice(h, value_width), heads_slice(h, key_width)
            state = torch.zeros(key_width, value_width, dtype=torch.float64)
            for t in range(x_TD.shape[0]):
                state = torch.diag(alpha[t, key]) @ state + torch.outer(k[t, key], v[t, value])
                o = state.T @ q[t, query] / math.sqrt(key_width)
                y[t, s] = rms(o) * weights["norm.weight"] * swish(gate[t, s])
        return y @ weights["o_proj.weight"].T

    check_definition(case, formula)


def test_log_decays_are_float32_beside_bfloat16_activations():
    mixer: Any = make_stack(Case("gla", {}), dtype=torch.bfloat16).layers[0]
    parts = mixer.project(random_inputs(9, dtype=torch.bfloat16))
    assert {x.dtype for x in parts.values()} == {torch.bfloat16}
    log_decay = mixer.log_decay(parts["decay"])
    assert log_decay.dtype == torch.float32 and bool((log_decay < 0).all())


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
        GLA.check(Options(**wrong), Dims())
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
