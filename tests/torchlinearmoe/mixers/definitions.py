"""What the tests of single mixers against their papers share: `check_definition` and a few formulas in plain steps.

A formula reads a mixer's weights and nothing else of it, goes token by token and head by head, and uses no operator of
the library, so that an error shared by the chunk-parallel and the step-by-step code is found too.

Shapes: T tokens, D width, W taps of a convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from mixer_cases import Case, make_stack, random_inputs, relative
from torch import Tensor

from torchlinearmoe.documents import Documents
from torchlinearmoe.mixers import MIXERS

EPS = 1e-6
"""The norms' epsilon in `mixer_cases.Dims`."""
LENGTHS = (1, 9, 70)

Weights = dict[str, Tensor]


def cases_of(name: str):
    """Parametrise over a mixer's defaults and variants."""
    cases = [Case(name, overrides) for overrides in ({}, *MIXERS[name].variants)]
    return pytest.mark.parametrize("case", cases, ids=str)


def check_definition(case: Case, formula: Callable[[Weights, Tensor], Tensor], layer: int = 1, **dims) -> None:
    """One layer, on packed documents, equals `formula(weights by name, x [T, D])` on each document."""
    mixer = make_stack(case, **dims).layers[layer]
    weights = {name: parameter.detach() for name, parameter in mixer.named_parameters()}
    x_TD = random_inputs(sum(LENGTHS), seed=layer)
    documents = Documents.packed([0, *accumulate(LENGTHS)])
    stack = make_stack(case, **dims)
    with torch.no_grad():
        actual = mixer(x_TD, stack.context(documents))[0]
        expected = torch.cat([formula(weights, part) for part in x_TD.split(LENGTHS)])
    assert relative(actual, expected) < 1e-9


def project(weights: Weights, name: str, x_TD: Tensor) -> Tensor:
    """The projection `name`, then its short convolution where there is one (without activation)."""
    y = x_TD @ weights[f"{name}_proj.weight"].T
    if f"convs.{name}.weight" not in weights:
        return y
    taps = weights[f"convs.{name}.weight"]
    result = torch.zeros_like(y) + weights.get(f"convs.{name}.bias", torch.zeros(()).double())
    for t in range(y.shape[0]):
        for age in range(min(taps.shape[1], t + 1)):
            result[t] += taps[:, taps.shape[1] - 1 - age] * y[t - age]
    return result


def heads_slice(head: int, width: int) -> slice:
    """The channels of a head."""
    return slice(head * width, (head + 1) * width)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def swish(x: Tensor) -> Tensor:
    return x * sigmoid(x)


def rms(x: Tensor) -> Tensor:
    """A vector over its root mean square."""
    return x / torch.sqrt((x * x).mean() + EPS)


MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda x: torch.where(x > 0, x + 1, torch.exp(x)),
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "silu": swish,
    "identity": lambda x: x,
}
