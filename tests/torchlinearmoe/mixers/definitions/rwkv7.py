"""Peng et al. 2025, arXiv 2503.14456, section 4. As in the paper a state is [V, K] and vectors are rows."""

from __future__ import annotations

import torch
from definitions.plain import Layer, delayed, join, normal, sigmoid, softplus, split, unit, zeros
from torch import Tensor


def definition(layer: Layer, x: Tensor) -> Tensor:
    def low_rank(name: str, y: Tensor, activation=lambda z: z) -> Tensor:
        return layer.linear(f"{name}_lora.up", activation(layer.linear(f"{name}_lora.down", y)))

    weights, d = layer.weights, delayed(x, 1) - x
    x_r, x_w, x_k, x_v, x_a, x_g = (x + d * weights[f"mixes.{name}"] for name in "rwkvag")
    r, k, v = (layer.linear(f"{name}_proj", y) for name, y in (("r", x_r), ("k", x_k), ("v", x_v)))
    w = torch.exp(-torch.exp(-softplus(-(weights["decay.base"] + low_rank("decay", x_w, torch.tanh))) - 0.5))
    a, g = sigmoid(low_rank("rate", x_a)), low_rank("gate", x_g, sigmoid)
    if layer.index == 0:
        layer.carried["v_first"] = v
    else:
        v = v + (layer.carried["v_first"] - v) * sigmoid(low_rank("value", x_v))
    kappa = unit(split(k * weights["removal"], layer.width), eps=0.0)
    k = k * (1 + (a - 1) * weights["replacement"])
    bonus = split(r * weights["bonus"] * k, layer.width).sum(-1, keepdim=True)
    r, w, k, v, a = (split(y, layer.width) for y in (r, w, k, v, a))
    heads = []
    for h in range(layer.heads):
        S, o = zeros(layer.width, layer.width), []
        for t in range(x.shape[0]):
            removed = torch.outer(kappa[t, h], a[t, h] * kappa[t, h])
            S = S @ (torch.diag(w[t, h]) - removed) + torch.outer(v[t, h], k[t, h])
            o.append(S @ r[t, h])
        heads.append(torch.stack(o))
    p = join(normal(torch.stack(heads, 1), layer.width * 1e-5)) * weights["norm.weight"] + weights["norm.bias"]
    return layer.linear("o_proj", g * (p + join(bonus * v)))
