"""Yang et al. 2024, arXiv 2412.06464: S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T."""

from __future__ import annotations

import math

import torch
from definitions.plain import Layer, eye, gated_heads, recurrence, sigmoid, softplus, split, spread, swish, unit
from torch import Tensor


def definition(layer: Layer, x: Tensor) -> Tensor:
    return output(layer, recurrence(step, query(layer, x), *write(layer, x)), x)


def query(layer: Layer, x: Tensor) -> Tensor:
    return _key(layer, "q", x) / math.sqrt(layer.width)


def write(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options, weights = layer.options, layer.weights
    v = split(swish(layer.project("v", x)), round(layer.width * options.expand_v))
    beta = sigmoid(layer.linear("b_proj", x)) * (2 if options.negative_eigenvalues else 1)
    dt = softplus(layer.linear("a_proj", x) + weights["decay.dt_bias"])
    return _key(layer, "k", x), v, beta, torch.exp(-torch.exp(weights["decay.A_log"]) * dt)


def step(S: Tensor, k: Tensor, v: Tensor, beta: Tensor, alpha: Tensor) -> Tensor:
    return alpha * (eye(len(k)) - beta * torch.outer(k, k)) @ S + beta * torch.outer(k, v)


def output(layer: Layer, o: Tensor, x: Tensor) -> Tensor:
    return gated_heads(layer, o, x)


def _key(layer: Layer, name: str, x: Tensor) -> Tensor:
    return spread(unit(split(swish(layer.project(name, x)), layer.width)), layer.options.value_heads or layer.heads)
