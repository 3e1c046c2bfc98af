"""Qin et al. 2023, arXiv 2307.14995; MiniMax 2025, arXiv 2501.08313; slopes of Press et al. 2021, 2108.12409."""

from __future__ import annotations

import math

import torch
from definitions.plain import Layer, join, recurrence, rms, sigmoid, split, swish
from torch import Tensor


def definition(layer: Layer, x: Tensor) -> Tensor:
    return output(layer, recurrence(step, query(layer, x), *write(layer, x)), x)


def query(layer: Layer, x: Tensor) -> Tensor:
    return split(swish(layer.project("q", x)), layer.width) / math.sqrt(layer.width)


def write(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    k, v = (split(swish(layer.project(name, x)), layer.width) for name in "kv")
    layers = layer.model.num_layers - 1 + layer.options.depth_eps
    factor = 1 - layer.index / layers + 1e-5 if layer.options.layer_factor else 1.0
    decays = [math.exp(-slope * factor) for slope in slopes(layer.heads)]
    return k, v, torch.tensor(decays, dtype=torch.float64).expand(x.shape[0], -1)


def slopes(heads: int) -> list[float]:
    """2^(-8 n / heads), n = 1 .. heads; other numbers than powers of two borrow every second one of the next."""
    power = 1
    while 2 * power <= heads:
        power *= 2
    own = [2 ** (-8 * n / power) for n in range(1, power + 1)]
    return own if power == heads else own + slopes(2 * power)[::2][: heads - power]


def step(S: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    return decay * S + torch.outer(k, v)


def output(layer: Layer, o: Tensor, x: Tensor) -> Tensor:
    options, weight = layer.options, layer.weights["norm.weight"]
    eps = options.norm_eps or layer.model.norm_eps
    y = join(rms(o, eps) * weight) if options.norm == "head" else rms(join(o), eps) * weight
    gate = layer.linear("g_proj", x)
    return layer.linear("o_proj", y * (sigmoid(gate) if options.gate == "sigmoid" else swish(gate)))
