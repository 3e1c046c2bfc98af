"""Kimi Delta Attention: its gate's precision and initial values, its heads."""

from __future__ import annotations

import math
from typing import Any

import torch
from mixer_cases import Case, Stack, make_stack, random_inputs, small_model
from torch.nn import functional as F

from torchlinearmoe.initialize import initialize
from torchlinearmoe.mixers.kda import ChannelDecay


def test_log_decays_are_float32_and_per_channel_beside_bfloat16_activations():
    mixer: Any = make_stack(Case("kda", {}), dtype=torch.bfloat16).layers[0]
    mixer.decay.float()
    parts = mixer.project(random_inputs(9, dtype=torch.bfloat16))
    beta, log_decay = mixer.strength(parts["b"]), mixer.decay(parts["decay"])
    assert parts["decay"].dtype == torch.bfloat16 and beta.dtype == log_decay.dtype == torch.float32
    assert log_decay.shape == (9, 2, 32) and bool((log_decay < 0).all())
    assert bool((log_decay.std(-1) > 1e-3).all())


def test_rates_and_steps_start_where_the_papers_put_them():
    stack = Stack(Case("kda", {"heads": 64, "head_dim": 16}), small_model())
    initialize(stack, 0)
    decay = stack.layers[0].decay
    assert isinstance(decay, ChannelDecay) and decay.keep_fp32
    rates, steps = decay.A_log.detach().exp(), F.softplus(decay.dt_bias.detach())
    assert 1 <= rates.min() < 3 and 14 < rates.max() <= 16
    assert 1e-3 * 0.99 < steps.min() < 1.2e-3 and 0.09 < steps.max() < 0.1 * 1.01
    middle = float(steps.log().mean())
    assert abs(middle - math.log(1e-2)) < 0.15, "uniform in the logarithm"


def test_more_value_heads_share_a_key_head_and_keep_a_state_each():
    mixer = make_stack(Case("kda", {"heads": 2, "head_dim": 16, "value_heads": 4})).layers[0]
    assert mixer.state_spec()["recurrent"].shape == (4, 16, 16)
    assert mixer.get_parameter("decay.dt_bias").shape == (64,) and mixer.get_parameter("decay.A_log").shape == (4,)
