"""Katharopoulos et al. 2020, arXiv 2006.16236: S_t = S_{t-1} + phi(k_t) v_t^T; phi also from later papers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from definitions.plain import MAPS, Layer, gated_heads, recurrence, softmax, split, swish
from torch import Tensor


def definition(layer: Layer, x: Tensor) -> Tensor:
    return output(layer, recurrence(step, query(layer, x), *write(layer, x)), x)


def query(layer: Layer, x: Tensor) -> Tensor:
    return _mapped(layer, "q", "q", x) / math.sqrt(layer.width)


def write(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    k = _mapped(layer, "k", "q" if layer.options.tie_feature_maps else "k", x)
    v = split(_convolved(layer, "v", x), round(layer.width * layer.options.expand_v))
    # The sum of the scores, where it divides, is what is read of values of one.
    return k, torch.cat([v, torch.ones_like(v[..., :1])], -1) if layer.options.normalize else v


def step(S: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return S + torch.outer(k, v)


def output(layer: Layer, o: Tensor, x: Tensor) -> Tensor:
    if layer.options.normalize:
        o = o[..., :-1] / (o[..., -1:] + 1e-6)
    return gated_heads(layer, o, x)


def _convolved(layer: Layer, name: str, x: Tensor) -> Tensor:
    y = layer.project(name, x)
    return swish(y) if layer.options.conv else y


def _mapped(layer: Layer, name: str, owner: str, x: Tensor) -> Tensor:
    own = f"{owner}_map."
    weights = {key.removeprefix(own): value for key, value in layer.weights.items() if key.startswith(own)}
    options = layer.options
    x = split(_convolved(layer, name, x), layer.width)
    return features(options.feature_map, x, weights, options.nu, options.feature_scale)


def features(name: str, x: Tensor, weights: Mapping[str, Tensor], nu: int, scale: float) -> Tensor:
    """phi of heads [..., K], every head by itself; papers in `feature_maps.py`."""
    if name in MAPS:
        return MAPS[name](x)
    if name == "t2r":
        y = x @ weights["weight"].T
        return (y + y.abs()) / 2
    if name == "hedgehog":
        y = scale * (x @ weights["weight"].T + weights["bias"])
        return softmax(torch.cat([y, -y], -1))
    if name == "dpfp":
        r = MAPS["relu"](torch.cat([x, -x], -1))
        width = r.shape[-1]
        return torch.stack([r[..., i] * r[..., (i + j) % width] for j in range(1, nu + 1) for i in range(width)], -1)
    first, second = (x @ weights[f"{part}_weight"].T + weights[f"{part}_bias"] for part in ("first", "second"))
    return first * second
