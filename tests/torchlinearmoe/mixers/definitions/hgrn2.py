"""Qin et al. 2024, arXiv 2404.07904: S_t = diag(f_t) S_{t-1} + (1 - f_t) i_t^T; lower bounds of arXiv 2311.04823."""

from __future__ import annotations

import math

import torch
from definitions.plain import Layer, join, normed, recurrence, sigmoid, split, swish, zeros
from torch import Tensor


def definition(layer: Layer, x: Tensor) -> Tensor:
    q, f, i = (layer.project(name, x) for name in "qfi")
    gamma = lower_bound(layer.shared["table"], layer.index) if layer.options.lower_bounds else 0.0
    forget = split(gamma + (1 - gamma) * sigmoid(f), layer.width)
    q = split(swish(q), layer.width) / math.sqrt(layer.width)
    o = join(recurrence(step, q, 1 - forget, split(i, layer.width), forget))
    return layer.linear("o_proj", normed(layer, o))


def lower_bound(table: Tensor, index: int) -> Tensor:
    """Of the layer `index`: shares of one from the second layer to this one, by a softmax over all layers [L, C]."""
    e = torch.exp(table)
    return sum((e[n] / e.sum(0) for n in range(1, index + 1)), zeros(table.shape[1]))


def step(S: Tensor, k: Tensor, v: Tensor, forget: Tensor) -> Tensor:
    return torch.diag(forget) @ S + torch.outer(k, v)
