"""RWKV6 against its paper (arXiv 2404.05892), one token and one head at a time, and its initial values.

The loops read the module's weights and nothing else of it.
"""

from __future__ import annotations

import math

import pytest
import torch
from mixer_cases import Case, Dims, make_stack, random_inputs, relative
from torch import Tensor

from torchlinearmoe.documents import Documents
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import initialize
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.mixers.base import Mixer
from torchlinearmoe.mixers.rwkv6 import Decay, _Recipe

LENGTHS = (1, 9, 66)
CASES = [Case("rwkv6", overrides) for overrides in ({}, *MIXERS["rwkv6"].variants)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rwkv6(case: Case):
    stack = make_stack(case)
    mixer, x_TD = stack.layers[1], random_inputs(sum(LENGTHS))
    with torch.no_grad():
        actual = mixer(x_TD, stack.context(Documents.packed([0, 1, 10, 76])))[0]
        expected = torch.cat([_time_mix(mixer, case.options, part) for part in x_TD.split(LENGTHS)])
    assert relative(actual, expected) < 1e-9


def _time_mix(mixer: Mixer, options, x_TD: Tensor) -> Tensor:
    heads, width, rank = options.heads or 2, options.head_dim or 32, options.mix_rank
    weight = {name: parameter.detach() for name, parameter in mixer.named_parameters()}
    states = torch.zeros(heads, width, width, dtype=torch.float64)
    outputs, before = [], torch.zeros_like(x_TD[0])
    for x in x_TD:
        d = before - x
        z = torch.tanh(weight["token_mix.down"] @ (x + weight["token_mix.x"] * d)).view(5, rank)
        up = weight["token_mix.up"].view(5, rank, -1)
        mixed = {name: x + (weight[f"token_mix.ramps.{name}"] + z[i] @ up[i]) * d for i, name in enumerate("wkvrg")}
        r, k, v, g = (weight[f"{name}_proj.weight"] @ mixed[name] for name in "rkvg")
        low = torch.tanh(weight["decay_down.weight"] @ mixed["w"])
        decay = torch.exp(-torch.exp(weight["decay.base"] + weight["decay_up.weight"] @ low))
        y = torch.zeros_like(v)
        for h in range(heads):
            s = slice(h * width, (h + 1) * width)
            write = torch.outer(k[s], v[s])
            o = (states[h] + torch.diag(weight["decay.bonus"][h]) @ write).T @ r[s]
            states[h] = torch.diag(decay[s]) @ states[h] + write
            unit = (o - o.mean()) / torch.sqrt(((o - o.mean()) ** 2).mean() + 64e-5)
            y[s] = unit * weight["norm.weight"][s] + weight["norm.bias"][s]
        outputs.append(weight["o_proj.weight"] @ (y * g / (1 + torch.exp(-g))))
        before = x
    return torch.stack(outputs)


def test_initial_values_are_the_authors_ramps():
    layers, width = 3, 64
    stack = make_stack(Case("rwkv6", {}), num_layers=layers)
    initialize(stack, 0)
    for layer, mixer in enumerate(stack.layers):
        weight = {name: parameter.detach() for name, parameter in mixer.named_parameters()}
        to_one, to_zero = layer / (layers - 1), 1 - layer / layers
        for n in range(width):
            x = n / width
            expected = {
                "token_mix.x": 1 - x**to_zero,
                "token_mix.ramps.w": 1 - x**to_zero,
                "token_mix.ramps.k": 1 - x**to_zero,
                "token_mix.ramps.v": 1 - (x**to_zero + 0.3 * to_one),
                "token_mix.ramps.r": 1 - x ** (0.5 * to_zero),
                "token_mix.ramps.g": 1 - x ** (0.5 * to_zero),
                "decay.base": -6 + 5 * (n / (width - 1)) ** (0.7 + 1.3 * to_one),
            }
            for name, value in expected.items():
                assert float(weight[name][n]) == pytest.approx(value, abs=1e-6), name
            zigzag = 0.1 * ((n + 1) % 3 - 1)
            bonus = to_one * (1 - n / (width - 1)) + zigzag
            assert float(weight["decay.bonus"].flatten()[n]) == pytest.approx(bonus, abs=1e-6)
        for name in ("token_mix.down", "decay_down.weight"):
            assert weight[name].eq(0).all()
        for name in ("token_mix.up", "decay_up.weight"):
            assert 0.009 < float(weight[name].abs().max()) < 0.01
            assert abs(float(weight[name].mean())) < 1e-3
        assert weight["norm.weight"].eq(1).all() and weight["norm.bias"].eq(0).all()


def test_one_layer_takes_the_first_layers_values():
    rows = torch.arange(8)
    for one, first in zip(_recipe_values(0, 1, rows), _recipe_values(0, 6, rows)):
        torch.testing.assert_close(one, first)


def _recipe_values(layer: int, layers: int, rows: Tensor) -> list[Tensor]:
    recipe = _Recipe(layer, layers)
    return [
        recipe.mix("v", 8).fill(rows),
        recipe.mix("r", 8).fill(rows),
        recipe.decay(8).fill(rows),
        recipe.bonus(2, 4).fill(rows[:2]),
    ]


def test_decays_are_float32_and_finite_at_the_extremes():
    decay = Decay(2, 3, _Recipe(0, 2))
    with torch.no_grad():
        decay.base.fill_(-3.0)
        decay.bonus.fill_(0.5)
    logits = torch.tensor([-1e4, -10.0, 0.0, 3.0, 50.0, 1e4]).bfloat16().requires_grad_()
    log_decay, bonus = decay(logits[None])
    assert log_decay.shape == (1, 2, 3) and log_decay.dtype == bonus.dtype == torch.float32
    expected = [0.0, -math.exp(-13), -math.exp(-3), -1.0]
    torch.testing.assert_close(log_decay.flatten()[:4], torch.tensor(expected), rtol=1e-5, atol=1e-12)
    assert bool((log_decay.flatten()[4:] < -100).all()) and bool(log_decay.isfinite().all())
    (log_decay.sum() + bonus.sum()).backward()
    for leaf in (logits, decay.base, decay.bonus):
        assert leaf.grad is not None and bool(leaf.grad.isfinite().all())
    assert bonus.data_ptr() != decay.bonus.data_ptr(), "under FSDP the parameter is freed after the call"


@pytest.mark.parametrize("key", ["mix_rank", "decay_rank"])
def test_ranks_are_at_least_one(key: str):
    mixer = MIXERS["rwkv6"]
    options: dict = {key: 0}
    with pytest.raises(RecipeError, match=rf"^mixer\.rwkv6\.{key} = 0: must be at least 1$"):
        mixer.check(mixer.Options(**options), Dims())
