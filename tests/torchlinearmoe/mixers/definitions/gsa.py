"""Zhang et al. 2024, arXiv 2409.07146: slots are moving averages of keys and of values, read by softmax."""

from __future__ import annotations

import torch
from definitions.plain import Layer, join, normed, sigmoid, softmax, split, spread, swish, zeros
from torch import Tensor


def definition(layer: Layer, x: Tensor) -> Tensor:
    options = layer.options
    key_width, value_width = round(layer.width * options.expand_k), round(layer.width * options.expand_v)
    q, k, v = (
        spread(split(swish(layer.project(name, x)), width), layer.heads)
        for name, width in (("q", key_width), ("k", key_width), ("v", value_width))
    )
    alpha = sigmoid(layer.linear("f_proj", x)) ** (1 / options.gate_normalizer)
    alpha = spread(split(alpha, options.slots), layer.heads)
    heads = []
    for h in range(layer.heads):
        keys, values, o = zeros(options.slots, key_width), zeros(options.slots, value_width), []
        for t in range(x.shape[0]):
            a = alpha[t, h, :, None]
            keys = a * keys + (1 - a) * k[t, h]
            values = a * values + (1 - a) * v[t, h]
            o.append(values.T @ softmax(keys @ q[t, h]))
        heads.append(torch.stack(o))
    return layer.linear("o_proj", normed(layer, swish(join(torch.stack(heads, 1)))))
