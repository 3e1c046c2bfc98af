"""Mixers against their papers' formulas, written once more: one token and one head at a time, in plain loops.

The loops read the module's weights and nothing else of it, so that an error shared by the chunk-parallel and the
step-by-step code is found too.

Shapes: T tokens, D width, K and V key and value width of a head.
"""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from mixer_cases import Case, make_stack, random_inputs, relative
from torch import Tensor

from torchlinearmoe.documents import Documents
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.mixers.base import Mixer

LENGTHS = (1, 9, 66)
EPS = 1e-6


def _cases(name: str):
    cases = [Case(name, overrides) for overrides in ({}, *MIXERS[name].variants)]
    return pytest.mark.parametrize("case", cases, ids=str)


def _check(case: Case, formula, **dims) -> None:
    """The second layer of a stack alone, document by document, against `formula(mixer, stack, x [T, D])`."""
    stack = make_stack(case, **dims)
    mixer, x_TD = stack.layers[1], random_inputs(sum(LENGTHS))
    context = stack.context(Documents.packed([0, 1, 10, 76]))
    with torch.no_grad():
        actual = mixer(x_TD, context)[0]
        expected = torch.cat([formula(mixer, stack, part) for part in x_TD.split(LENGTHS)])
    assert relative(actual, expected) < 1e-9


def _weight(mixer: Mixer, name: str) -> Tensor:
    return mixer.get_parameter(name).detach()


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def _swish(x: Tensor) -> Tensor:
    return x * _sigmoid(x)


def _project(mixer: Mixer, name: str, x_TD: Tensor) -> Tensor:
    """Projection, with its bias where it has one, then the short convolution (no activation)."""
    parameters = dict(mixer.named_parameters())
    y = x_TD @ _weight(mixer, f"{name}_proj.weight").T
    if f"{name}_proj.bias" in parameters:
        y = y + _weight(mixer, f"{name}_proj.bias")
    if f"convs.{name}.weight" not in parameters:
        return y
    taps = parameters[f"convs.{name}.weight"].detach()
    width = taps.shape[1]
    result = torch.zeros_like(y)
    for t in range(y.shape[0]):
        for age in range(min(width, t + 1)):
            result[t] += taps[:, width - 1 - age] * y[t - age]
    return result


def _rms(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean() + EPS)


@_cases("hgrn2")
def test_hgrn2(case: Case):
    def formula(mixer: Mixer, stack, x_TD: Tensor) -> Tensor:
        width = case.options.head_dim or 32
        q, f, i = (_project(mixer, name, x_TD) for name in "qfi")
        gamma = torch.zeros(f.shape[1], dtype=torch.float64)
        if case.options.lower_bounds:
            table = dict(stack.shared.named_parameters())["hgrn2.table"].detach()
            shares = torch.exp(table) / torch.exp(table).sum(0)
            gamma = shares.cumsum(0)[1] - shares[0]
        forget = gamma + (1 - gamma) * _sigmoid(f)
        y = torch.zeros_like(i)
        for h in range(i.shape[1] // width):
            s = slice(h * width, (h + 1) * width)
            state = torch.zeros(width, width, dtype=torch.float64)
            for t in range(x_TD.shape[0]):
                state = torch.diag(forget[t, s]) @ state + torch.outer(1 - forget[t, s], i[t, s])
                y[t, s] = state.T @ _swish(q[t, s]) / math.sqrt(width)
        y = torch.stack([_rms(row) for row in y]) * _weight(mixer, "norm.weight")
        return y @ _weight(mixer, "o_proj.weight").T

    _check(case, formula)


@_cases("gated_delta_net")
def test_gated_delta_net(case: Case):
    def formula(mixer: Mixer, stack, x_TD: Tensor) -> Tensor:
        options = case.options
        heads, width = options.heads or 2, options.head_dim or 32
        value_heads, value_width = options.value_heads or heads, round(width * options.expand_v)
        q, k, v = (_swish(_project(mixer, name, x_TD)) for name in "qkv")
        gate = x_TD @ _weight(mixer, "g_proj.weight").T
        step = torch.log1p(torch.exp(x_TD @ _weight(mixer, "a_proj.weight").T + _weight(mixer, "decay.dt_bias")))
        alpha = torch.exp(-torch.exp(_weight(mixer, "decay.A_log")) * step)
        beta = _sigmoid(x_TD @ _weight(mixer, "b_proj.weight").T) * (2 if options.negative_eigenvalues else 1)
        y = torch.zeros_like(v)
        for h in range(value_heads):
            key = slice(*(width * (h * heads // value_heads + n) for n in (0, 1)))
            s = slice(h * value_width, (h + 1) * value_width)
            state = torch.zeros(width, value_width, dtype=torch.float64)
            for t in range(x_TD.shape[0]):
                q_K, k_K = (x[t, key] / torch.sqrt((x[t, key] ** 2).sum() + 1e-6) for x in (q, k))
                a, b = alpha[t, h], beta[t, h]
                transition = a * (torch.eye(width, dtype=torch.float64) - b * torch.outer(k_K, k_K))
                state = transition @ state + b * torch.outer(k_K, v[t, s])
                o = state.T @ q_K / math.sqrt(width)
                y[t, s] = _rms(o) * _weight(mixer, "norm.weight") * _swish(gate[t, s])
        return y @ _weight(mixer, "o_proj.weight").T

    _check(case, formula)


@_cases("linear_attention")
def test_linear_attention(case: Case):
    maps = {
        "elu": lambda x: torch.where(x > 0, x + 1, torch.exp(x)),
        "relu": lambda x: torch.where(x > 0, x, 0.0),
        "silu": _swish,
        "identity": lambda x: x,
    }

    def formula(mixer: Mixer, stack, x_TD: Tensor) -> Tensor:
        options = case.options
        heads, width = options.heads or 2, options.head_dim or 32
        value_width = round(width * options.expand_v)
        q, k, v = (_project(mixer, name, x_TD) for name in "qkv")
        if options.conv:
            q, k, v = _swish(q), _swish(k), _swish(v)
        phi = maps[options.feature_map]
        gate = x_TD @ _weight(mixer, "g_proj.weight").T
        y = torch.zeros_like(v)
        for h in range(heads):
            key, s = slice(h * width, (h + 1) * width), slice(h * value_width, (h + 1) * value_width)
            for t in range(x_TD.shape[0]):
                scores = [phi(q[t, key]) @ phi(k[j, key]) / math.sqrt(width) for j in range(t + 1)]
                o = torch.stack([score * v[j, s] for j, score in enumerate(scores)]).sum(0)
                if options.normalize:
                    o = o / (torch.stack(scores).sum() + 1e-6)
                y[t, s] = _rms(o) * _weight(mixer, "norm.weight") * _swish(gate[t, s])
        return y @ _weight(mixer, "o_proj.weight").T

    _check(case, formula)


@_cases("softmax_attention")
@pytest.mark.parametrize("bias", [True, False])
def test_softmax_attention(case: Case, bias: bool):
    theta = 500.0

    def rotated(x: Tensor, position: int) -> Tensor:
        """Pair (i, i + d/2) as one complex number, turned by position theta^(-2i/d)."""
        half = x.shape[0] // 2
        pairs = [
            complex(float(x[i]), float(x[i + half])) * cmath.exp(1j * position * theta ** (-2 * i / x.shape[0]))
            for i in range(half)
        ]
        return torch.tensor([p.real for p in pairs] + [p.imag for p in pairs], dtype=torch.float64)

    def formula(mixer: Mixer, stack, x_TD: Tensor) -> Tensor:
        options = case.options
        heads, width, groups = options.heads or 2, options.head_dim or 32, options.kv_heads or 1
        assert bias == ("q_proj.bias" in dict(mixer.named_parameters()))
        q, k, v = (_project(mixer, name, x_TD) for name in "qkv")
        if options.conv:
            q, k, v = _swish(q), _swish(k), _swish(v)
        y = torch.zeros_like(q)
        for h in range(heads):
            s, g = slice(h * width, (h + 1) * width), slice(*(width * (h * groups // heads + n) for n in (0, 1)))
            keys = [rotated(k[j, g], j) for j in range(x_TD.shape[0])]
            for t in range(x_TD.shape[0]):
                scores = torch.stack([rotated(q[t, s], t) @ keys[j] / math.sqrt(width) for j in range(t + 1)])
                weights = torch.exp(scores) / torch.exp(scores).sum()
                y[t, s] = weights @ v[: t + 1, g]
        return y @ _weight(mixer, "o_proj.weight").T

    _check(case, formula, rope_theta=theta, qkv_bias=bias)
