"""RWKV6: its initial values, its decay's precision, what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from mixer_cases import Case, make_stack, small_model
from torch import Tensor

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import initialize
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.mixers.rwkv6 import Decay, _Recipe
from torchlinearmoe.optim.build import parameter_groups


def test_initial_values_are_the_authors():
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
        scale = ((layer + 1) / layers) ** 0.7
        assert (weight["norm.weight"] - scale).abs().max() < 1e-6 and weight["norm.bias"].eq(0).all()
        for name, gain in {"r": 1.0, "k": 0.1, "v": 1.0, "g": 0.1}.items():
            W = weight[f"{name}_proj.weight"]
            torch.testing.assert_close(W @ W.T, gain**2 * torch.eye(width).to(W), rtol=0, atol=1e-5)


def test_no_low_rank_factor_is_decayed():
    """As in the authors' code, which decays no parameter named w1 or w2."""
    layer = make_stack(Case("rwkv6", {})).layers[1]
    decayed = {id(parameter) for parameter in parameter_groups(layer, 0.1)[0]["params"]}
    names = {name for name, parameter in layer.named_parameters() if id(parameter) in decayed}
    assert names == {f"{name}_proj.weight" for name in "rkvgo"}


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
        mixer.check(mixer.Options(**options), small_model())
