"""Peng et al. 2024, arXiv 2404.05892, equations 11 to 20: a token reads before it writes, itself by the bonus."""

from __future__ import annotations

import torch
from definitions.plain import Layer, delayed, join, normal, split, swish, zeros
from torch import Tensor


def definition(layer: Layer, x: Tensor) -> Tensor:
    weights, d = layer.weights, delayed(x, 1) - x
    z = torch.tanh((x + weights["token_mix.x"] * d) @ weights["token_mix.down"].T)
    ranks = layer.options.mix_rank
    mixed = {}
    for n, name in enumerate("wkvrg"):
        block = slice(n * ranks, (n + 1) * ranks)
        mixed[name] = x + (weights[f"token_mix.ramps.{name}"] + z[:, block] @ weights["token_mix.up"][block]) * d
    r, k, v, g = (split(layer.linear(f"{name}_proj", mixed[name]), layer.width) for name in "rkvg")
    logits = weights["decay.base"] + layer.linear("decay_up", torch.tanh(layer.linear("decay_down", mixed["w"])))
    w = split(torch.exp(-torch.exp(logits)), layer.width)
    heads = []
    for h in range(layer.heads):
        S, o = zeros(layer.width, layer.width), []
        for t in range(x.shape[0]):
            kv = torch.outer(k[t, h], v[t, h])
            o.append((S + torch.diag(weights["decay.bonus"][h]) @ kv).T @ r[t, h])
            S = torch.diag(w[t, h]) @ S + kv
        heads.append(torch.stack(o))
    y = join(normal(torch.stack(heads, 1), 64e-5)) * weights["norm.weight"] + weights["norm.bias"]
    return layer.linear("o_proj", y * swish(join(g)))
