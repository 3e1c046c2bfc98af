"""Feature maps of linear attention: their formulas, precision, initial values, FLOPs and refusals."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest
import torch
from definitions import linear_attention as definition
from definitions.plain import split
from mixer_cases import Case, make_stack, relative, small_model
from parameter_formulas import feature_map as parameters_of_map

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import initialize
from torchlinearmoe.kernels.linear import linear_recurrence_flops
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.mixers.feature_maps import (
    ELEMENTWISE,
    LEARNED,
    POSITIVE,
    feature_width,
    make_feature_map,
)

NAMES = (*ELEMENTWISE, "t2r", "hedgehog", "dpfp", "hadamard")


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_map_is_its_formula_on_every_head(name: str, scale: float):
    torch.manual_seed(0)
    heads, width, nu = 3, 8, 2
    feature_dim = 5 if name in ("t2r", "hadamard") else 0
    phi = make_feature_map(name, width, feature_dim, nu, scale).double()
    with torch.no_grad():
        for parameter in phi.parameters():
            parameter.normal_()
    weight = {key: parameter.detach() for key, parameter in phi.named_parameters()}
    x = torch.randn(4, heads * width).double()
    with torch.no_grad():
        features = phi(x)
    assert features.shape == (4, heads, feature_width(name, width, feature_dim, nu))
    torch.testing.assert_close(features, definition.features(name, split(x, width), weight, nu, scale))
    assert sum(parameter.numel() for parameter in phi.parameters()) == parameters_of_map(name, width, feature_dim)
    assert bool((features >= 0).all()) == (name in POSITIVE)
    assert bool(weight) == (name in LEARNED)


@pytest.mark.parametrize("name", LEARNED)
def test_half_precision_maps_stay_close(name: str):
    torch.manual_seed(1)
    phi = make_feature_map(name, 16, 0, 1, 1.0)
    with torch.no_grad():
        for parameter in phi.parameters():
            parameter.normal_(0, 0.3)
        x = torch.randn(50, 32).bfloat16()
        exact, half = phi(x.float()), phi.bfloat16()(x)
    assert half.dtype == torch.bfloat16
    assert relative(half, exact) < 1e-2


def test_hedgehog_starts_with_the_identity_in_every_layer():
    stack = make_stack(Case("linear_attention", {"feature_map": "hedgehog", "conv": 3}))
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
        ({"feature_scale": 2.0}, "feature_scale = 2: only hedgehog has one, not 'elu'"),
        ({"feature_map": "hedgehog", "feature_scale": 0.0}, "feature_scale = 0: must be above zero and finite"),
        ({"feature_map": "hedgehog", "feature_scale": -2.0}, "feature_scale = -2: must be above zero and finite"),
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
        mixer.check(mixer.Options(**options), small_model())
    assert str(error.value) == f"mixer.linear_attention.{message}"


@pytest.mark.parametrize("name", POSITIVE)
def test_positive_maps_may_be_normalised(name: str):
    mixer, options = MIXERS["linear_attention"], {"feature_map": name, "normalize": True}
    mixer.check(mixer.Options(**options), small_model())  # pyright: ignore[reportCallIssue, reportArgumentType]
