"""Ainslie et al. 2023, arXiv 2305.13245; rotary positions of 2104.09864, the window of 2004.05150.

Norms of heads, the gate and the rotation of some channels are Qwen3-Next's; norms of all heads together are OLMo 2's.
"""

from __future__ import annotations

import math

import torch
from definitions.plain import Layer, join, rms, rotated, sigmoid, softmax, split, spread, swish
from torch import Tensor


def definition(layer: Layer, x: Tensor) -> Tensor:
    options, width = layer.options, layer.options.head_dim or layer.model.head_dim
    q, k, v = (split(swish(y) if options.conv else y, width) for y in (layer.project(name, x) for name in "qkv"))
    offset, eps = layer.model.norm_offset, layer.model.norm_eps
    if options.qk_norm == "head":
        q, k = (rms(y, eps) * (offset + layer.weights[f"{n}_norm.weight"]) for n, y in zip("qk", (q, k)))
    if options.qk_norm == "full":
        q, k = (join(y) for y in (q, k))
        q, k = (rms(y, eps) * (offset + layer.weights[f"{n}_norm.weight"]) for n, y in zip("qk", (q, k)))
        q, k = (split(y, width) for y in (q, k))
    if options.rope:
        turning = options.rotary_dim or width
        q, k = (torch.cat([rotated(y[..., :turning], layer.model.rope_theta), y[..., turning:]], -1) for y in (q, k))
    k, v = (spread(y, layer.heads) for y in (k, v))
    heads, scale = [], options.scale or 1 / math.sqrt(width)
    for h in range(layer.heads):
        o = []
        for t in range(x.shape[0]):
            seen = slice(max(t + 1 - options.window, 0) if options.window else 0, t + 1)
            o.append(softmax(k[seen, h] @ q[t, h] * scale) @ v[seen, h])
        heads.append(torch.stack(o))
    o = join(torch.stack(heads, 1))
    return layer.linear("o_proj", o * sigmoid(layer.linear("g_proj", x)) if options.output_gate else o)
