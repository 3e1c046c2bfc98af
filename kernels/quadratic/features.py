"""Second-order features: vectors whose inner product is a quadratic polynomial of the inner product they are made of.

    taylor   phi(x) = [1, x_i, x_i^2 / sqrt 2, x_i x_j (i < j)]    phi(q) . phi(k) = 1 + s + s^2 / 2,    s = q . k
    square   phi(x) = [x_i^2, sqrt 2 x_i x_j (i < j)]              phi(q) . phi(k) = s^2

A product x_i x_j stands once, so F = K (K + 1) / 2, and 1 + K more for taylor. Pairs are listed by rows:

    K = 3    left   0 0 0 1 1 2
             right  0 1 2 1 2 2

Legend: K query/key width, F features.
"""

import math

import torch
from torch import Tensor

from torchlinearmoe.precision import in_float32

KINDS = ("taylor", "square")


def feature_width(kind: str, width: int) -> int:
    """F of vectors of `width`."""
    pairs = width * (width + 1) // 2
    return 1 + width + pairs if kind == "taylor" else pairs


class QuadraticFeatures:
    """The features of sqrt(scale) x and the polynomial of scale * s, with what their backward passes need."""

    def __init__(self, kind: str, width: int, scale: float, device: torch.device) -> None:
        self.kind, self.width, self.scale = kind, width, scale
        self.count = feature_width(kind, width)
        self.left, self.right = torch.triu_indices(width, width, device=device)
        off_diagonal = (self.left != self.right).double()
        self.weight = math.sqrt(0.5) ** (1 - off_diagonal) if kind == "taylor" else math.sqrt(2.0) ** off_diagonal

    def features(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., F] in x's dtype; the products are made in fp32 (fp64 for fp64)."""
        wide = in_float32(x) * math.sqrt(self.scale)
        pairs = wide[..., self.left] * self.weight.to(wide.dtype) * wide[..., self.right]
        if self.kind == "square":
            return pairs.to(x.dtype)
        return torch.cat([torch.ones_like(x[..., :1]), wide.to(x.dtype), pairs.to(x.dtype)], -1)

    def gradient(self, x: Tensor, d_features: Tensor) -> Tensor:
        """The gradient by x [..., K] of what has the gradient d_features [..., F], in fp32 (fp64)."""
        wide = in_float32(x) * math.sqrt(self.scale)
        d_pairs = d_features[..., -self.weight.shape[0] :].to(wide.dtype) * self.weight.to(wide.dtype)
        # d x_i = sum_j (d_ij + d_ji) x_j: every entry (i, j) of a square looks up its pair, the diagonal counts twice.
        lookup = torch.empty(self.width, self.width, dtype=torch.long, device=x.device)
        places = torch.arange(self.weight.shape[0], device=x.device)
        lookup[self.left, self.right] = places
        lookup[self.right, self.left] = places
        square = d_pairs[..., lookup.flatten()].unflatten(-1, (self.width, self.width))
        d_wide = (square * wide.unsqueeze(-2)).sum(-1) + d_pairs[..., lookup.diagonal()] * wide
        if self.kind == "taylor":
            d_wide = d_wide + d_features[..., 1 : 1 + self.width].to(wide.dtype)
        return d_wide * math.sqrt(self.scale)

    def score(self, s: Tensor) -> Tensor:
        """The polynomial of scale * s, in fp32 (fp64)."""
        s = in_float32(s) * self.scale
        return s * s if self.kind == "square" else 1 + s * (1 + s / 2)

    def slope(self, s: Tensor) -> Tensor:
        """The derivative of `score` by s."""
        s = in_float32(s) * self.scale
        return self.scale * (2 * s if self.kind == "square" else 1 + s)
