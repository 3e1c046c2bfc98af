"""Based and Rebased against their papers: scores of all pairs of tokens, one at a time, in plain loops.

The loops read the module's weights and nothing else of it. Rebased is also checked as the paper words it, by the
explicit map of second-order monomials.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mixer_cases import Case, Dims, make_stack, random_inputs, relative
from torch import Tensor

from torchlinearmoe.documents import Documents
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import initialize
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.mixers.base import Mixer

LENGTHS = (1, 9, 75)


def _cases(name: str):
    return pytest.mark.parametrize(
        "case", [Case(name, overrides) for overrides in ({}, *MIXERS[name].variants)], ids=str
    )


def _check(case: Case, score) -> None:
    """The second layer of a stack, document by document; `score(mixer, q [K], k [K])` is a number."""
    stack = make_stack(case)
    mixer, x_TD = stack.layers[1], random_inputs(sum(LENGTHS))
    with torch.no_grad():
        actual = mixer(x_TD, stack.context(Documents.packed([0, 1, 10, 85])))[0]
        expected = torch.cat([_attend(mixer, case.options, part, score) for part in x_TD.split(LENGTHS)])
    assert relative(actual, expected) < 1e-9


def _attend(mixer: Mixer, options: Any, x_TD: Tensor, score) -> Tensor:
    epsilon = 1e-6 if mixer.name == "based" else 1e-5
    heads, width, values = options.heads or 2, options.feature_dim, options.head_dim or 32
    q, k, v = (_project(mixer, name, x_TD) for name in "qkv")
    y = torch.zeros_like(v)
    for h in range(heads):
        key, value = slice(h * width, (h + 1) * width), slice(h * values, (h + 1) * values)
        for t in range(x_TD.shape[0]):
            scores = torch.stack([score(mixer, q[t, key], k[j, key]) for j in range(t + 1)])
            y[t, value] = scores @ v[: t + 1, value] / (scores.sum() + epsilon)
    if options.gate:
        gate = x_TD @ _weight(mixer, "g_proj.weight").T
        y = y * gate / (1 + torch.exp(-gate))
    return y @ _weight(mixer, "o_proj.weight").T


def _project(mixer: Mixer, name: str, x_TD: Tensor) -> Tensor:
    """Projection, then the short convolution and SiLU where the mixer has one."""
    y = x_TD @ _weight(mixer, f"{name}_proj.weight").T
    parameters = dict(mixer.named_parameters())
    if f"convs.{name}.weight" not in parameters:
        return y
    taps = parameters[f"convs.{name}.weight"].detach()
    result = torch.zeros_like(y)
    for t in range(y.shape[0]):
        for age in range(min(taps.shape[1], t + 1)):
            result[t] += taps[:, taps.shape[1] - 1 - age] * y[t - age]
    return result / (1 + torch.exp(-result))


def _weight(mixer: Mixer, name: str) -> Tensor:
    return mixer.get_parameter(name).detach()


@_cases("based")
def test_based(case: Case):
    def taylor(mixer: Mixer, q: Tensor, k: Tensor) -> Tensor:
        s = (q * k).sum() / math.sqrt(q.shape[0])
        return 1 + s + s**2 / 2

    _check(case, taylor)


@_cases("rebased")
def test_rebased(case: Case):
    def affine(mixer: Mixer, norm: str, x: Tensor) -> Tensor:
        centred = x - x.mean()
        unit = centred / torch.sqrt((centred**2).mean() + 1e-6)
        return _weight(mixer, f"{norm}.weight") * unit + _weight(mixer, f"{norm}.bias")

    def features(x: Tensor) -> Tensor:
        """[x_i^2 / sqrt d, sqrt(2 / d) x_i x_j]: the paper's map, whose inner product is (q . k)^2 / d."""
        d = x.shape[0]
        outer = torch.outer(x, x) / d**0.5
        rows, columns = torch.triu_indices(d, d, offset=1)
        return torch.cat([outer.diagonal(), math.sqrt(2) * outer[rows, columns]])

    def square(mixer: Mixer, q: Tensor, k: Tensor) -> Tensor:
        k_norm = "q_norm" if case.options.tie_norms else "k_norm"
        return features(affine(mixer, "q_norm", q)) @ features(affine(mixer, k_norm, k))

    _check(case, square)


@pytest.mark.parametrize(("name", "rows"), [("based", 153), ("rebased", 136)])
def test_sixteen_channels_make_the_papers_state(name: str, rows: int):
    mixer = make_stack(Case(name, {})).layers[0]
    assert mixer.state_spec()["recurrent"].shape == (2, rows, 33)


def test_rebased_norms_start_neutral_and_apart():
    stack = make_stack(Case("rebased", {}))
    initialize(stack, 0)
    for norm in ("q_norm", "k_norm"):
        assert _weight(stack.layers[0], f"{norm}.weight").eq(1).all()
        assert _weight(stack.layers[0], f"{norm}.bias").eq(0).all()
    tied = {name for name, _ in make_stack(Case("rebased", {"tie_norms": True})).layers[0].named_parameters()}
    assert "q_norm.weight" in tied and "k_norm.weight" not in tied


@pytest.mark.parametrize("name", ["based", "rebased"])
def test_queries_need_a_channel(name: str):
    mixer = MIXERS[name]
    with pytest.raises(RecipeError, match=rf"^mixer\.{name}\.feature_dim = 0: must be at least 1$"):
        mixer.check(mixer.Options(feature_dim=0), Dims())  # pyright: ignore[reportCallIssue]
