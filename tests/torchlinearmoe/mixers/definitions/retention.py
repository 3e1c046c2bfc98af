"""Sun et al. 2023, arXiv 2307.08621: S_t = gamma S_{t-1} + k_t v_t^T, queries and keys rotated."""

from __future__ import annotations

import math

import torch
from definitions.plain import MAPS, Layer, gated_heads, recurrence, rotated, split, swish
from torch import Tensor


def definition(layer: Layer, x: Tensor) -> Tensor:
    q, k = (_placed(layer, name, x) for name in "qk")
    v = split(_convolved(layer, "v", x), round(layer.width * layer.options.expand_v))
    gammas = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(layer.heads)], dtype=torch.float64)
    o = recurrence(step, q / math.sqrt(layer.width), k, v, gammas.expand(x.shape[0], -1))
    return gated_heads(layer, o, x)


def step(S: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
    return gamma * S + torch.outer(k, v)


def _placed(layer: Layer, name: str, x: Tensor) -> Tensor:
    y = split(MAPS[layer.options.feature_map](_convolved(layer, name, x)), layer.width)
    return rotated(y, layer.options.rope_theta) if layer.options.rope_theta else y


def _convolved(layer: Layer, name: str, x: Tensor) -> Tensor:
    y = layer.project(name, x)
    return swish(y) if layer.options.conv else y
