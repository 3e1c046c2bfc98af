"""RWKV7: its values that go on through the layers, its initial values, its decay's precision, its ranks."""

from __future__ import annotations

import math

import pytest
import torch
from mixer_cases import Case, make_stack, random_inputs, small_model

from torchlinearmoe.documents import Documents
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import Constant, initialize
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.mixers.base import LayerPlace
from torchlinearmoe.mixers.rwkv7 import Decay, LowRank, Options
from torchlinearmoe.optim.build import parameter_groups


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
    for place, sets in ((LayerPlace(3, 0, 2), True), (LayerPlace(4, 1, 2), False)):
        names = {name for name, _ in build(Options(), small_model(num_layers=5), place).named_children()}  # pyright: ignore
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
        for name, gain in {"r": 1.0, "k": 0.1, "v": 1.0}.items():
            W = weight[f"{name}_proj.weight"]
            torch.testing.assert_close(W @ W.T, gain**2 * torch.eye(width).to(W), rtol=0, atol=1e-5)
        for name in ("decay", "rate", "gate", *(("value",) if layer else ())):
            assert weight[f"{name}_lora.down.weight"].eq(0).all()
            up = weight[f"{name}_lora.up.weight"]
            torch.testing.assert_close(up.T @ up, 0.01 * torch.eye(up.shape[1]).to(up), rtol=0, atol=1e-5)


def test_low_rank_matrices_wider_than_the_layer_start_at_the_authors_size():
    """theirs, [rank, width]: gain 0.1 sqrt(rank / width), orthonormal columns."""
    low = LowRank(8, 20, 8)
    initialize(low, 0)
    up = low.up.weight.detach()
    torch.testing.assert_close(up @ up.T, 0.01 * 20 / 8 * torch.eye(8), rtol=0, atol=1e-6)


def test_the_denominator_of_the_group_norm_is_not_its_eps_at_the_start():
    torch.manual_seed(0)
    stack = make_stack(Case("rwkv7", {}), dtype=torch.float32)
    initialize(stack, 0)
    seen: list[torch.Tensor] = []
    for layer in stack.layers:
        layer.get_submodule("norm").register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        stack.packed(random_inputs(200, dtype=torch.float32), [200])
    for o, layer in zip(seen, stack.layers, strict=True):
        eps = layer.get_submodule("norm").eps
        assert isinstance(eps, float)
        assert float(o.var(-1, correction=0).median()) > 20 * eps


def test_no_low_rank_factor_is_decayed():
    """As in the authors' code, which decays the weights of layers alone."""
    layer = make_stack(Case("rwkv7", {})).layers[1]
    decayed = {id(parameter) for parameter in parameter_groups(layer, 0.1)[0]["params"]}
    names = {name for name, parameter in layer.named_parameters() if id(parameter) in decayed}
    assert names == {f"{name}_proj.weight" for name in "rkvo"}


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
    dims = small_model(hidden_size=width, num_heads=width // 64)
    with torch.device("meta"):
        mixer = MIXERS["rwkv7"](Options(), dims, LayerPlace(1, 1, 2))  # pyright: ignore
    names = ("decay", "rate", "value", "gate")
    assert tuple(mixer.get_parameter(f"{name}_lora.up.weight").shape[1] for name in names) == expected


def test_negative_ranks_are_refused():
    mixer = MIXERS["rwkv7"]
    with pytest.raises(RecipeError, match=r"^mixer\.rwkv7\.gate_rank = -1: must not be negative$"):
        mixer.check(Options(gate_rank=-1), small_model())
