"""Feature maps against their papers' formulas, alone and inside linear attention."""

from __future__ import annotations

import inspect
import math
from typing import get_args, get_type_hints

import pytest
import test_mixer_contract as contract
import test_mixer_sequences as sequences
import torch
from mixer_cases import Case, Dims, make_stack, random_inputs, relative
from torch import Tensor

from torchlinearmoe.documents import Documents
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import initialize
from torchlinearmoe.kernels.flops import linear_recurrence_flops
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.mixers.feature_maps import (
    ELEMENTWISE,
    LEARNED,
    POSITIVE,
    feature_width,
    make_feature_map,
    num_parameters,
)

NAMES = (*ELEMENTWISE, "t2r", "hedgehog", "dpfp", "hadamard")
CASES = [
    Case("linear_attention", overrides)
    for overrides in (
        {"feature_map": "t2r", "feature_dim": 20, "normalize": True},
        {"feature_map": "t2r", "tie_feature_maps": True},
        {"feature_map": "hedgehog", "normalize": True, "conv": 3},
        {"feature_map": "hedgehog", "tie_feature_maps": True, "heads": 3, "head_dim": 16, "expand_v": 0.5},
        {"feature_map": "dpfp", "nu": 2, "normalize": True},
        {"feature_map": "hadamard", "feature_dim": 12},
    )
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
LENGTHS = (1, 9, 66)


def formula(name: str, x: Tensor, weight: dict[str, Tensor], nu: int) -> Tensor:
    """phi of one head's vector [K], entry by entry."""
    if name == "elu":
        return torch.stack([a + 1 if a > 0 else torch.exp(a) for a in x])
    if name == "relu":
        return torch.stack([a if a > 0 else torch.zeros_like(a) for a in x])
    if name == "silu":
        return x / (1 + torch.exp(-x))
    if name == "identity":
        return x
    if name == "t2r":
        y = weight["weight"] @ x
        return (y + y.abs()) / 2
    if name == "hedgehog":
        y = weight["weight"] @ x + weight["bias"]
        both = torch.exp(torch.cat([y, -y]))
        return both / both.sum()
    if name == "dpfp":
        r = [max(float(a), 0.0) for a in x] + [max(-float(a), 0.0) for a in x]
        products = [r[i] * r[(i + j) % len(r)] for j in range(1, nu + 1) for i in range(len(r))]
        return torch.tensor(products, dtype=x.dtype)
    first, second = (weight[f"{part}_weight"] @ x + weight[f"{part}_bias"] for part in ("first", "second"))
    return first * second


@pytest.mark.parametrize("name", NAMES)
def test_a_map_is_its_formula_on_every_head(name: str):
    torch.manual_seed(0)
    heads, width, nu = 3, 8, 2
    feature_dim = 5 if name in ("t2r", "hadamard") else 0
    phi = make_feature_map(name, width, feature_dim, nu).double()
    with torch.no_grad():
        for parameter in phi.parameters():
            parameter.normal_()
    weight = {key: parameter.detach() for key, parameter in phi.named_parameters()}
    x = torch.randn(4, heads * width).double()
    with torch.no_grad():
        features = phi(x)
    assert features.shape == (4, heads, feature_width(name, width, feature_dim, nu))
    for t in range(4):
        for h in range(heads):
            expected = formula(name, x[t, h * width : (h + 1) * width], weight, nu)
            torch.testing.assert_close(features[t, h], expected)
    assert sum(parameter.numel() for parameter in phi.parameters()) == num_parameters(name, width, feature_dim)
    assert bool((features >= 0).all()) == (name in POSITIVE)
    assert bool(weight) == (name in LEARNED)


@pytest.mark.parametrize("name", LEARNED)
def test_half_precision_maps_stay_close(name: str):
    torch.manual_seed(1)
    phi = make_feature_map(name, 16, 0, 1)
    with torch.no_grad():
        for parameter in phi.parameters():
            parameter.normal_(0, 0.3)
        x = torch.randn(50, 32).bfloat16()
        exact, half = phi(x.float()), phi.bfloat16()(x)
    assert half.dtype == torch.bfloat16
    assert relative(half, exact) < 1e-2


def test_hedgehog_starts_with_the_identity_in_every_layer():
    stack = make_stack(CASES[2])
    initialize(stack, 0)
    for mixer in stack.layers:
        for name in ("q_map", "k_map"):
            weight = mixer.get_parameter(f"{name}.weight")
            assert torch.equal(weight, torch.eye(32, dtype=weight.dtype))
            assert mixer.get_parameter(f"{name}.bias").eq(0).all()


def test_queries_and_keys_have_maps_of_their_own_unless_tied():
    apart, tied = (
        make_stack(Case("linear_attention", {"feature_map": "t2r", "tie_feature_maps": tie})).layers[0]
        for tie in (False, True)
    )
    initialize(apart, 0)
    assert not torch.equal(apart.get_parameter("q_map.weight"), apart.get_parameter("k_map.weight"))
    assert "k_map.weight" not in dict(tied.named_parameters()) and "q_map.weight" in dict(tied.named_parameters())


@every_case
def test_linear_attention(case: Case):
    """Every pair of tokens once, with the scores of the case's features."""
    stack = make_stack(case)
    mixer, x_TD = stack.layers[1], random_inputs(sum(LENGTHS))
    with torch.no_grad():
        actual = mixer(x_TD, stack.context(Documents.packed([0, 1, 10, 76])))[0]
        expected = torch.cat([_attend(mixer, case.options, part) for part in x_TD.split(LENGTHS)])
    assert relative(actual, expected) < 1e-9


def _attend(mixer, options, x_TD: Tensor) -> Tensor:
    parameters = {name: parameter.detach() for name, parameter in mixer.named_parameters()}
    heads, width = options.heads or 2, options.head_dim or 32
    values = round(width * options.expand_v)
    projected = {}
    for name in "qkv":
        y = x_TD @ parameters[f"{name}_proj.weight"].T
        if options.conv:
            taps, raw, y = parameters[f"convs.{name}.weight"], y, torch.zeros_like(y)
            for t in range(raw.shape[0]):
                for age in range(min(options.conv, t + 1)):
                    y[t] += taps[:, options.conv - 1 - age] * raw[t - age]
            y = y / (1 + torch.exp(-y))
        projected[name] = y
    maps = {
        name: {key.split(".")[1]: value for key, value in parameters.items() if key.startswith(f"{source}_map.")}
        for name, source in (("q", "q"), ("k", "q" if options.tie_feature_maps else "k"))
    }
    gate = x_TD @ parameters["g_proj.weight"].T
    y = torch.zeros_like(projected["v"])
    for h in range(heads):
        key, s = slice(h * width, (h + 1) * width), slice(h * values, (h + 1) * values)
        q, k = (
            torch.stack([formula(options.feature_map, x, maps[name], options.nu) for x in projected[name][:, key]])
            for name in "qk"
        )
        for t in range(x_TD.shape[0]):
            scores = k[: t + 1] @ q[t] / math.sqrt(width)
            o = scores @ projected["v"][: t + 1, s]
            o = o / (scores.sum() + 1e-6) if options.normalize else o
            unit = o / torch.sqrt((o * o).mean() + 1e-6)
            y[t, s] = unit * parameters["norm.weight"] * gate[t, s] / (1 + torch.exp(-gate[t, s]))
    return y @ parameters["o_proj.weight"].T


def _shared_checks():
    """The tests of the mixer contract that take a case and nothing else."""
    for module in (contract, sequences):
        for name, test in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("test_") and list(inspect.signature(test).parameters) == ["case"]:
                yield pytest.param(test, id=name.removeprefix("test_"))


@every_case
@pytest.mark.parametrize("check", list(_shared_checks()))
def test_the_mixer_contract_holds(check, case: Case):
    check(case)


def test_flops_count_a_map_for_every_head_and_role():
    for tie in (False, True):
        options = {"feature_map": "hedgehog", "tie_feature_maps": tie}
        mixer = make_stack(Case("linear_attention", options), num_heads=4).layers[0]
        projections = 2 * 5 * 64 * 64
        maps = 2 * 4 * 2 * 16 * 16
        assert mixer.flops_per_token(100) == projections + maps + linear_recurrence_flops(4, 32, 16)


def test_the_recipe_lists_every_map():
    options = MIXERS["linear_attention"].Options
    assert sorted(get_args(get_type_hints(options)["feature_map"])) == sorted(NAMES)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"feature_dim": 8}, "feature_dim = 8: only t2r and hadamard choose their features, not 'elu'"),
        ({"feature_map": "dpfp", "nu": 64}, "nu = 64: must be 1 to 63, below twice the head width"),
        ({"feature_map": "dpfp", "nu": 0}, "nu = 0: must be 1 to 63, below twice the head width"),
        ({"tie_feature_maps": True}, "tie_feature_maps = true: 'elu' has nothing to tie; for t2r, hedgehog, hadamard"),
        *(
            (
                {"feature_map": name, "normalize": True},
                f"normalize = true: needs a positive feature_map (elu, relu, t2r, hedgehog, dpfp), not '{name}'",
            )
            for name in ("silu", "identity", "hadamard")
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, message: str):
    mixer = MIXERS["linear_attention"]
    with pytest.raises(RecipeError) as error:
        mixer.check(mixer.Options(**options), Dims())
    assert str(error.value) == f"mixer.linear_attention.{message}"


@pytest.mark.parametrize("name", POSITIVE)
def test_positive_maps_may_be_normalised(name: str):
    mixer, options = MIXERS["linear_attention"], {"feature_map": name, "normalize": True}
    mixer.check(mixer.Options(**options), Dims())  # pyright: ignore[reportCallIssue, reportArgumentType]
