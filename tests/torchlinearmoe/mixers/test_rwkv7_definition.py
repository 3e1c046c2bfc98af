"""RWKV7 against its paper (arXiv 2503.14456), one token and one head at a time, its values that go on through the
layers, and its initial values.

The loops read the modules' weights and nothing else of them. As in the paper a state is [V, K] and vectors are rows.
"""

from __future__ import annotations

import math

import pytest
import torch
from definitions import Weights, cases_of, heads_slice, sigmoid
from mixer_cases import Case, Dims, make_stack, random_inputs, relative
from torch import Tensor

from torchlinearmoe.documents import Documents
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import Constant, initialize
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.mixers.base import Place
from torchlinearmoe.mixers.rwkv7 import Decay, Options

LENGTHS = (1, 9, 66)


@cases_of("rwkv7")
def test_two_layers_equal_the_paper(case: Case):
    stack, x_TD = make_stack(case), random_inputs(sum(LENGTHS))
    weights = [{name: p.detach() for name, p in mixer.named_parameters()} for mixer in stack.layers]
    with torch.no_grad():
        actual = stack.packed(x_TD, LENGTHS)
        expected = []
        for part in x_TD.split(LENGTHS):
            y, values = _time_mix(weights[0], case, part, None)
            middle = part + y
            expected.append(middle + _time_mix(weights[1], case, middle, values)[0])
    assert relative(actual, torch.cat(expected)) < 1e-9


def _time_mix(weight: Weights, case: Case, x_TD: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output of one document, and the values [T, H V] of the first layer."""
    heads, width = case.options.heads or 2, case.options.head_dim or 32
    states = torch.zeros(heads, width, width, dtype=torch.float64)
    outputs, values, before = [], [], torch.zeros_like(x_TD[0])
    for t, x in enumerate(x_TD):
        x_r, x_w, x_k, x_v, x_a, x_g = (x + (before - x) * weight[f"mixes.{name}"] for name in "rwkvag")
        r, k, v = (weight[f"{name}_proj.weight"] @ y for name, y in (("r", x_r), ("k", x_k), ("v", x_v)))
        d = weight["decay.base"] + _up(weight, "decay", torch.tanh(_down(weight, "decay", x_w)))
        w = torch.exp(-torch.exp(-torch.log1p(torch.exp(-d)) - 0.5))
        a = sigmoid(weight["rate_lora.up.bias"] + _up(weight, "rate", _down(weight, "rate", x_a)))
        if first is None:
            values.append(v)
        else:
            share = sigmoid(weight["value_lora.up.bias"] + _up(weight, "value", _down(weight, "value", x_v)))
            v = (1 - share) * v + share * first[t]
        g = _up(weight, "gate", sigmoid(_down(weight, "gate", x_g)))
        p = torch.zeros_like(v)
        for h in range(heads):
            s = heads_slice(h, width)
            kappa = k[s] * weight["removal"][s]
            kappa = kappa / torch.sqrt((kappa * kappa).sum())
            key = k[s] * (1 - weight["replacement"][s] + weight["replacement"][s] * a[s])
            states[h] = states[h] @ (torch.diag(w[s]) - torch.outer(kappa, a[s] * kappa)) + torch.outer(v[s], key)
            o = states[h] @ r[s]
            o = (o - o.mean()) / torch.sqrt(((o - o.mean()) ** 2).mean() + width * 1e-5)
            p[s] = o * weight["norm.weight"][s] + weight["norm.bias"][s]
            p[s] += (r[s] * weight["bonus"][s] * key).sum() * v[s]
        outputs.append(weight["o_proj.weight"] @ (g * p))
        before = x
    return torch.stack(outputs), torch.stack(values) if first is None else first


def _down(weight: Weights, name: str, x: Tensor) -> Tensor:
    return weight[f"{name}_lora.down.weight"] @ x


def _up(weight: Weights, name: str, low: Tensor) -> Tensor:
    return weight[f"{name}_lora.up.weight"] @ low


def test_only_the_first_layer_of_the_mixer_sets_the_values():
    stack = make_stack(Case("rwkv7", {}), num_layers=5)
    build, x_TD = type(stack.layers[0]), random_inputs(7)
    context = stack.context(Documents.packed([0, 7]))
    other = torch.ones(7)
    with torch.no_grad():
        carried = stack.layers[0](x_TD, context, None, {"other": other})[2]
        assert carried.keys() == {"v_first", "other"} and carried["other"] is other
        again = stack.layers[1](x_TD, context, None, carried)[2]
    assert again["v_first"] is carried["v_first"]
    for place, sets in ((Place(3, 0, 2), True), (Place(4, 1, 2), False)):
        names = {name for name, _ in build(Options(), Dims(num_layers=5), place).named_children()}  # pyright: ignore
        assert ("value_lora" in names) != sets


def test_gradients_reach_the_first_layer_through_the_values():
    stack, x_TD = make_stack(Case("rwkv7", {})), random_inputs(9)
    context = stack.context(Documents.packed([0, 9]))
    carried = stack.layers[0](x_TD, context)[2]
    stack.layers[1](x_TD, context, None, carried)[0].sum().backward()
    grad = stack.layers[0].get_parameter("v_proj.weight").grad
    assert grad is not None and float(grad.norm()) > 1e-3


def test_initial_values_are_the_authors():
    layers, width, head = 3, 64, 32
    stack = make_stack(Case("rwkv7", {}), num_layers=layers)
    initialize(stack, 0)
    powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
    for layer, mixer in enumerate(stack.layers):
        weight = {name: parameter.detach() for name, parameter in mixer.named_parameters()}
        to_one, to_zero = layer / (layers - 1), 1 - layer / layers
        for n in range(width):
            line = n / (width - 1) - 0.5
            z = (n % head - (head - 1) / 2) / ((head - 1) / 2)
            zigzag = z * abs(z)
            expected = {
                "decay.base": -6 + 6 * (n / (width - 1)) ** (1 + to_one**0.3) + 0.5 + 2.5 * zigzag,
                "rate_lora.up.bias": -0.19 + 0.3 * zigzag + 0.4 * line,
                "removal": 0.71 - 0.1 * line,
                "replacement": 1.02,
                "bonus": -0.04,
                "norm.weight": ((1 + layer) / layers) ** 0.7,
                "norm.bias": 0.0,
            }
            expected |= {f"mixes.{name}": 1 - (n / width) ** (power * to_zero) for name, power in powers.items()}
            if layer:
                expected["value_lora.up.bias"] = 0.73 - 0.4 * line
            for name, value in expected.items():
                assert float(weight[name][n]) == pytest.approx(value, abs=1e-6), name
        for name, reach in {"r": 0.5, "k": 0.05, "v": 0.5}.items():
            largest = float(weight[f"{name}_proj.weight"].abs().max())
            assert 0.99 < largest / (reach / width**0.5) <= 1.0
        for name in ("decay", "rate", "gate", *(("value",) if layer else ())):
            assert weight[f"{name}_lora.down.weight"].eq(0).all()
            columns = weight[f"{name}_lora.up.weight"].square().sum(0).sqrt()
            assert float(columns.mean()) == pytest.approx(0.1, rel=0.1)


def test_log_decays_are_float32_between_their_bounds():
    decay = Decay(3, 6, Constant(0.0))
    with torch.no_grad():
        decay.base.fill_(-3.0)
    logits = torch.tensor([-1e4, -10.0, 0.0, 3.0, 50.0, 1e4]).bfloat16().requires_grad_()
    log_decay = decay(logits[None])
    assert log_decay.shape == (1, 2, 3) and log_decay.dtype == torch.float32
    expected = [-math.exp(-0.5) / (1 + math.exp(-x)) for x in (-700.0, -13.0, -3.0, 0.0, 47.0, 700.0)]
    torch.testing.assert_close(log_decay.flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-12)
    log_decay.sum().backward()
    for leaf in (logits, decay.base):
        assert leaf.grad is not None and bool(leaf.grad.isfinite().all())


@pytest.mark.parametrize(
    ("width", "expected"),
    [(64, (32, 32, 32, 32)), (768, (64, 64, 32, 128)), (1024, (64, 64, 64, 160)), (4096, (160, 160, 96, 320))],
)
def test_default_ranks_grow_with_the_root_of_the_width(width: int, expected: tuple[int, ...]):
    dims = Dims(hidden_size=width, num_heads=width // 64)
    with torch.device("meta"):
        mixer = MIXERS["rwkv7"](Options(), dims, Place(1, 1, 2))  # pyright: ignore
    names = ("decay", "rate", "value", "gate")
    assert tuple(mixer.get_parameter(f"{name}_lora.up.weight").shape[1] for name in names) == expected


def test_negative_ranks_are_refused():
    mixer = MIXERS["rwkv7"]
    with pytest.raises(RecipeError, match=r"^mixer\.rwkv7\.gate_rank = -1: must not be negative$"):
        mixer.check(Options(gate_rank=-1), Dims())
