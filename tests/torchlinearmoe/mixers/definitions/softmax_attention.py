"""Ainslie et al. 2023, arXiv 2305.13245; rotary positions of 2104.09864, the window of 2004.05150."""

from __future__ import annotations

import math

import torch
from definitions.plain import Layer, join, rotated, softmax, split, spread, swish
from torch import Tensor


def definition(layer: Layer, x: Tensor) -> Tensor:
    options, width = layer.options, layer.options.head_dim or layer.model.head_dim
    q, k, v = (split(swish(y) if options.conv else y, width) for y in (layer.project(name, x) for name in "qkv"))
    q, k = (rotated(y, layer.model.rope_theta) for y in (q, k))
    k, v = (spread(y, layer.heads) for y in (k, v))
    heads = []
    for h in range(layer.heads):
        o = []
        for t in range(x.shape[0]):
            seen = slice(max(t + 1 - options.window, 0) if options.window else 0, t + 1)
            o.append(softmax(k[seen, h] @ q[t, h] / math.sqrt(width)) @ v[seen, h])
        heads.append(torch.stack(o))
    return layer.linear("o_proj", join(torch.stack(heads, 1)))
