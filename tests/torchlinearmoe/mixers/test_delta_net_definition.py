"""DeltaNet against its paper, and what each of its heads can hold."""

from __future__ import annotations

import math

import pytest
import torch
from definitions import cases_of, check_definition, heads_slice, project, rms, sigmoid, swish
from mixer_cases import Case, Dims, make_stack, random_inputs
from torch import Tensor

from torchlinearmoe.documents import Documents
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.mixers.delta_mixer import DeltaMixer
from torchlinearmoe.mixers.delta_net import DeltaNet, Options


@cases_of("delta_net")
def test_equals_the_paper(case: Case):
    options = case.options
    heads, width = options.heads or 2, options.head_dim or 32
    value_heads = options.value_heads or heads
    key_width, value_width = round(width * options.expand_k), round(width * options.expand_v)

    def formula(weights: dict[str, Tensor], x_TD: Tensor) -> Tensor:
        q, k, v = (swish(project(weights, name, x_TD)) for name in "qkv")
        beta = sigmoid(x_TD @ weights["b_proj.weight"].T) * (2 if options.negative_eigenvalues else 1)
        y = torch.zeros_like(v)
        for h in range(value_heads):
            key, s = heads_slice(h * heads // value_heads, key_width), heads_slice(h, value_width)
            state = torch.zeros(key_width, value_width, dtype=torch.float64)
            for t in range(x_TD.shape[0]):
                q_K, k_K = (unit(x[t, key]) for x in (q, k))
                # The paper's equation: the value under the key is replaced by a mean of the old and the new one.
                old = state.T @ k_K
                new = beta[t, h] * v[t, s] + (1 - beta[t, h]) * old
                state = state - torch.outer(k_K, old) + torch.outer(k_K, new)
                y[t, s] = rms(state.T @ q_K / math.sqrt(key_width)) * weights["norm.weight"]
        if options.gate:
            y = y * swish(x_TD @ weights["g_proj.weight"].T)
        return y @ weights["o_proj.weight"].T

    check_definition(case, formula)


def unit(x: Tensor) -> Tensor:
    """A vector over its length."""
    return x / torch.sqrt((x * x).sum() + 1e-6)


@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net", "kda"])
@pytest.mark.parametrize("negative", [False, True])
def test_transitions_have_negative_eigenvalues_only_when_asked_for(name: str, negative: bool):
    """Whatever the inputs, 1 - b stays within [0, 1] or reaches below zero."""
    mixer = make_stack(Case(name, {"negative_eigenvalues": negative})).layers[0]
    assert isinstance(mixer, DeltaMixer)
    beta = mixer.strength(mixer.project(30 * random_inputs(50))["b"]).detach()
    assert float(beta.min()) >= 0 and bool((1 - beta).min() < -0.5) == negative
    assert float(beta.max()) <= (2 if negative else 1)


@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net", "kda"])
def test_constant_inputs_that_silence_the_keys_leave_finite_gradients(name: str):
    stack = make_stack(Case(name, {}), dtype=torch.float32)
    x_TD = torch.zeros(70, 64, requires_grad=True)
    y_TD, _ = stack(x_TD, stack.context(Documents.packed([0, 70])))
    y_TD.square().sum().backward()
    assert x_TD.grad is not None and bool(x_TD.grad.isfinite().all())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in stack.parameters())


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            {"heads": 2, "head_dim": 32, "value_heads": 3},
            "mixer.delta_net.value_heads = 3: must be a multiple of the 2",
        ),
        ({"expand_k": 0.01}, "mixer.delta_net.expand_k = 0.01: must make whole channels"),
        ({"expand_v": 0.01}, "mixer.delta_net.expand_v = 0.01: must make whole channels"),
    ],
)
def test_refuses_in_one_line(wrong, message):
    with pytest.raises(RecipeError) as error:
        DeltaNet.check(Options(**wrong), Dims())
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
