"""Aksenov et al. 2024, arXiv 2402.10644: (q . k)^2 / d of normalised queries and keys, by the paper's map."""

from __future__ import annotations

import math

import torch
from definitions.based import attend, convolved
from definitions.plain import Layer, normal, split
from torch import Tensor


def definition(layer: Layer, x: Tensor) -> Tensor:
    def affine(norm: str, y: Tensor) -> Tensor:
        return layer.weights[f"{norm}.weight"] * normal(y, layer.model.norm_eps) + layer.weights[f"{norm}.bias"]

    def scores(q: Tensor, k: Tensor) -> Tensor:
        return k @ q

    q, k = (split(convolved(layer, name, x), layer.options.feature_dim) for name in "qk")
    k_norm = "q_norm" if layer.options.tie_norms else "k_norm"
    return attend(layer, scores, features(affine("q_norm", q)), features(affine(k_norm, k)), x, epsilon=1e-5)


def features(x: Tensor) -> Tensor:
    """[x_i^2 / sqrt d, sqrt(2 / d) x_i x_j], i < j, of [..., d]."""
    d = x.shape[-1]
    pairs = [x[..., i] * x[..., j] * math.sqrt(2) for i in range(d) for j in range(i + 1, d)]
    return torch.stack([*(x[..., i] ** 2 for i in range(d)), *pairs], -1) / d**0.5
