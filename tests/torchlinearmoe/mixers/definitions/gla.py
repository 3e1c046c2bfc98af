"""Yang et al. 2023, arXiv 2312.06635: S_t = diag(a_t) S_{t-1} + k_t v_t^T."""

from __future__ import annotations

import math

import torch
from definitions.plain import MAPS, Layer, gated_heads, recurrence, sigmoid, split, spread, swish
from torch import Tensor


def definition(layer: Layer, x: Tensor) -> Tensor:
    return output(layer, recurrence(step, query(layer, x), *write(layer, x)), x)


def query(layer: Layer, x: Tensor) -> Tensor:
    width = _key_width(layer)
    return split(MAPS[layer.options.feature_map](_convolved(layer, "q", x)), width) / math.sqrt(width)


def write(layer: Layer, x: Tensor) -> tuple[Tensor, ...]:
    options = layer.options
    alpha = sigmoid(layer.linear("decay_up", layer.linear("decay_down", x))) ** (1 / options.gate_normalizer)
    if options.clamp_min is not None:
        alpha = torch.where(alpha > math.exp(options.clamp_min), alpha, math.exp(options.clamp_min))
    k = split(MAPS[options.feature_map](_convolved(layer, "k", x)), _key_width(layer))
    v = split(_convolved(layer, "v", x), round(layer.width * options.expand_v))
    return tuple(spread(part, layer.heads) for part in (k, v, split(alpha, _key_width(layer))))


def step(S: Tensor, k: Tensor, v: Tensor, alpha: Tensor) -> Tensor:
    return torch.diag(alpha) @ S + torch.outer(k, v)


def output(layer: Layer, o: Tensor, x: Tensor) -> Tensor:
    return gated_heads(layer, o, x)


def _key_width(layer: Layer) -> int:
    return round(layer.width * layer.options.expand_k)


def _convolved(layer: Layer, name: str, x: Tensor) -> Tensor:
    y = layer.project(name, x)
    return swish(y) if layer.options.conv else y
