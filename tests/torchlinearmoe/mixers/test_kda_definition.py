"""Kimi Delta Attention against its paper, its gate's precision and initial values."""

from __future__ import annotations

import math
from typing import Any

import torch
from definitions import cases_of, check_definition, heads_slice, project, rms, sigmoid, swish
from mixer_cases import Case, Dims, Stack, make_stack, random_inputs
from torch import Tensor
from torch.nn import functional as F

from torchlinearmoe.initialize import initialize
from torchlinearmoe.mixers.kda import ChannelDecay


@cases_of("kda")
def test_equals_the_paper(case: Case):
    options = case.options
    heads, width = options.heads or 2, options.head_dim or 32
    value_heads, value_width = options.value_heads or heads, round(width * options.expand_v)

    def formula(weights: dict[str, Tensor], x_TD: Tensor) -> Tensor:
        q, k, v = (swish(project(weights, name, x_TD)) for name in "qkv")
        logits = x_TD @ weights["decay_down.weight"].T @ weights["decay_up.weight"].T + weights["decay.dt_bias"]
        gate = x_TD @ weights["gate_down.weight"].T @ weights["gate_up.weight"].T + weights["gate_up.bias"]
        beta = sigmoid(x_TD @ weights["b_proj.weight"].T) * (2 if options.negative_eigenvalues else 1)
        y = torch.zeros_like(v)
        for h in range(value_heads):
            key, s = heads_slice(h * heads // value_heads, width), heads_slice(h, value_width)
            # exp(-rate log(1 + e^x)) is (1 + e^x)^-rate.
            rate = torch.exp(weights["decay.A_log"][h])
            alpha = (1 + torch.exp(logits[:, heads_slice(h, width)])) ** -rate
            state = torch.zeros(width, value_width, dtype=torch.float64)
            for t in range(x_TD.shape[0]):
                q_K, k_K = (x[t, key] / torch.sqrt((x[t, key] ** 2).sum() + 1e-6) for x in (q, k))
                erase = torch.eye(width, dtype=torch.float64) - beta[t, h] * torch.outer(k_K, k_K)
                state = erase @ torch.diag(alpha[t]) @ state + beta[t, h] * torch.outer(k_K, v[t, s])
                o = state.T @ q_K / math.sqrt(width)
                y[t, s] = rms(o) * weights["norm.weight"] * sigmoid(gate[t, s])
        return y @ weights["o_proj.weight"].T

    check_definition(case, formula)


def test_log_decays_are_float32_and_per_channel_beside_bfloat16_activations():
    mixer: Any = make_stack(Case("kda", {}), dtype=torch.bfloat16).layers[0]
    mixer.decay.float()
    parts = mixer.project(random_inputs(9, dtype=torch.bfloat16))
    beta, log_decay = mixer.strength(parts["b"]), mixer.decay(parts["decay"])
    assert parts["decay"].dtype == torch.bfloat16 and beta.dtype == log_decay.dtype == torch.float32
    assert log_decay.shape == (9, 2, 32) and bool((log_decay < 0).all())
    assert bool((log_decay.std(-1) > 1e-3).all())


def test_rates_and_steps_start_where_the_papers_put_them():
    stack = Stack(Case("kda", {"heads": 64, "head_dim": 16}), Dims())
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
