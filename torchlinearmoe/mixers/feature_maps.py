"""Feature maps phi of linear attention: what stands in for the exponential of q . k.

A map acts on every head by itself, and all heads share its parameters, where it has any. Those that are never negative
may be normalised: phi(q) . phi(k) is then a weight. This file registers no mixer; `linear_attention.py` uses it.

    elu        elu(x) + 1                           positive    Katharopoulos et al. 2020, arXiv 2006.16236
    relu       relu(x)                              positive
    silu       silu(x)
    identity   x
    t2r        relu(W x)                            positive    Kasai et al. 2021, arXiv 2103.13076
    hedgehog   softmax(s [W x + b, -(W x + b)])     positive    Zhang et al. 2024, arXiv 2402.04347; fla's has s = 2
    dpfp       r_i r_{i+j}, j = 1 .. nu,            positive    Schlag et al. 2021, arXiv 2102.11174
               r = [relu(x), relu(-x)]
    hadamard   (W x + b) * (W' x + b')

Shapes: T tokens, H heads, K key width of a head, F features of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlinearmoe.initialize import ZEROS, Normal, Rows, set_initializers
from torchlinearmoe.module import Module
from torchlinearmoe.precision import in_float32

ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "silu": F.silu,
    "identity": lambda x: x,
}
LEARNED = ("t2r", "hedgehog", "hadamard")
POSITIVE = ("elu", "relu", "t2r", "hedgehog", "dpfp")
"""Maps whose features are never negative."""
FREE_WIDTH = ("t2r", "hadamard")
"""Maps whose number of features is a choice."""


def feature_width(name: str, head_dim: int, feature_dim: int, nu: int) -> int:
    """F of the map `name` of heads of `head_dim`; `feature_dim` 0 stands for as many."""
    if name in FREE_WIDTH:
        return feature_dim or head_dim
    return {"hedgehog": 2 * head_dim, "dpfp": 2 * head_dim * nu}.get(name, head_dim)


def make_feature_map(name: str, head_dim: int, feature_dim: int, nu: int, scale: float) -> FeatureMap:
    """The map `name` of heads of `head_dim`; `feature_dim`, `nu` and `scale` are read by the maps that have them."""
    if name in ELEMENTWISE:
        return Elementwise(head_dim, ELEMENTWISE[name])
    if name == "dpfp":
        return DPFP(head_dim, nu)
    if name == "hedgehog":
        return Hedgehog(head_dim, scale)
    return {"t2r": T2R, "hadamard": Hadamard}[name](head_dim, feature_dim or head_dim)


class FeatureMap(Module):
    """phi of every head: [T, H K] -> [T, H, F]."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def forward(self, x: Tensor) -> Tensor:
        """[T, H K] -> [T, H, F]; the head count is read from the shape."""
        return self.of_heads(x.unflatten(-1, (-1, self.head_dim)))

    def of_heads(self, x: Tensor) -> Tensor:
        """[T, H, K] -> [T, H, F]."""
        raise NotImplementedError


class Elementwise(FeatureMap):
    """A function of one number."""

    def __init__(self, head_dim: int, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(head_dim)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        # Before heads are cut: a compiler takes elu's gradient for contiguous where that of a view is not.
        return self.function(x).unflatten(-1, (-1, self.head_dim))


class DPFP(FeatureMap):
    """Deterministic parameter-free projection: products of neighbouring rectified halves, F = 2 K nu."""

    def __init__(self, head_dim: int, nu: int) -> None:
        super().__init__(head_dim)
        self.nu = nu

    def of_heads(self, x: Tensor) -> Tensor:
        r = torch.cat([F.relu(x), F.relu(-x)], -1)
        return torch.cat([r * r.roll(-j, -1) for j in range(1, self.nu + 1)], -1)


class T2R(FeatureMap):
    """A rectified linear map."""

    def __init__(self, head_dim: int, features: int) -> None:
        super().__init__(head_dim)
        self.weight = nn.Parameter(torch.empty(features, head_dim))
        set_initializers(self, weight=Normal(head_dim**-0.5))

    def of_heads(self, x: Tensor) -> Tensor:
        return F.relu(F.linear(x, self.weight))


class Hedgehog(FeatureMap):
    """A softmax over `scale` times a linear map and its negative, F = 2 K; starts with W the identity and b zero."""

    def __init__(self, head_dim: int, scale: float) -> None:
        super().__init__(head_dim)
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(head_dim, head_dim))
        self.bias = nn.Parameter(torch.empty(head_dim))
        set_initializers(self, weight=Rows(self._identity_rows), bias=ZEROS)

    def _identity_rows(self, rows: Tensor) -> Tensor:
        return F.one_hot(rows, self.head_dim).float()

    def of_heads(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        wide = self.scale * in_float32(y)
        return torch.cat([wide, -wide], -1).softmax(-1).to(x.dtype)


class Hadamard(FeatureMap):
    """The product of two linear maps: second-order features, learned."""

    def __init__(self, head_dim: int, features: int) -> None:
        super().__init__(head_dim)
        self.first_weight = nn.Parameter(torch.empty(features, head_dim))
        self.first_bias = nn.Parameter(torch.empty(features))
        self.second_weight = nn.Parameter(torch.empty(features, head_dim))
        self.second_bias = nn.Parameter(torch.empty(features))
        normal = Normal(head_dim**-0.5)
        set_initializers(self, first_weight=normal, first_bias=ZEROS, second_weight=normal, second_bias=ZEROS)

    def of_heads(self, x: Tensor) -> Tensor:
        return F.linear(x, self.first_weight, self.first_bias) * F.linear(x, self.second_weight, self.second_bias)
