"""Yang et al. 2024, arXiv 2406.06484: the value under a key is replaced, by a mean of the old and the new one."""

from __future__ import annotations

import math

import torch
from definitions.plain import Layer, gated_heads, join, normed, recurrence, sigmoid, split, spread, swish, unit
from torch import Tensor


def definition(layer: Layer, x: Tensor) -> Tensor:
    options = layer.options
    heads, width = options.value_heads or layer.heads, round(layer.width * options.expand_k)
    q, k = (spread(unit(split(swish(layer.project(name, x)), width)), heads) for name in "qk")
    v = split(swish(layer.project("v", x)), round(layer.width * options.expand_v))
    beta = sigmoid(layer.linear("b_proj", x)) * (2 if options.negative_eigenvalues else 1)
    o = recurrence(step, q / math.sqrt(width), k, v, beta)
    if options.gate:
        return gated_heads(layer, o, x)
    return layer.linear("o_proj", join(normed(layer, o)))


def step(S: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    old = S.T @ k
    new = beta * v + (1 - beta) * old
    return S - torch.outer(k, old) + torch.outer(k, new)
