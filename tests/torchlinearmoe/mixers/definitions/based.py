"""Arora et al. 2024, arXiv 2402.18668: the exponential's second-order series in the place of softmax's."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from definitions.plain import Layer, join, split, swish
from torch import Tensor


def definition(layer: Layer, x: Tensor) -> Tensor:
    def scores(q: Tensor, k: Tensor) -> Tensor:
        s = k @ q / math.sqrt(len(q))
        return 1 + s + s**2 / 2

    q, k = (split(convolved(layer, name, x), layer.options.feature_dim) for name in "qk")
    return attend(layer, scores, q, k, x, epsilon=1e-6)


def attend(
    layer: Layer, scores: Callable[[Tensor, Tensor], Tensor], q: Tensor, k: Tensor, x: Tensor, epsilon: float
) -> Tensor:
    """Means of the values so far, weighted by `scores(q of a token, k of all so far)`; the gate; the projection."""
    v = split(convolved(layer, "v", x), layer.width)
    heads = []
    for h in range(layer.heads):
        o = []
        for t in range(x.shape[0]):
            s = scores(q[t, h], k[: t + 1, h])
            o.append(s @ v[: t + 1, h] / (s.sum() + epsilon))
        heads.append(torch.stack(o))
    y = join(torch.stack(heads, 1))
    return layer.linear("o_proj", y * swish(layer.linear("g_proj", x)) if layer.options.gate else y)


def convolved(layer: Layer, name: str, x: Tensor) -> Tensor:
    y = layer.project(name, x)
    return swish(y) if layer.options.conv else y
