"""Kimi Team 2025, arXiv 2510.26692: S_t = (I - b_t k_t k_t^T) diag(a_t) S_{t-1} + b_t k_t v_t^T."""

from __future__ import annotations

import math

import torch
from definitions.plain import Layer, activated, eye, join, normed, recurrence, sigmoid, split, spread, swish, unit
from torch import Tensor

DECAY, GATE = ["decay_down", "decay_up"], ["gate_down", "gate_up"]


def definition(layer: Layer, x: Tensor) -> Tensor:
    options, weights = layer.options, layer.weights
    heads, width = options.value_heads or layer.heads, layer.width
    q, k = (spread(unit(split(swish(layer.project(name, x)), width)), heads) for name in "qk")
    v = split(swish(layer.project("v", x)), round(width * options.expand_v))
    beta = sigmoid(layer.linear("b_proj", x)) * (2 if options.negative_eigenvalues else 1)
    decays, gates = (["decay_proj"], ["g_proj"]) if options.full_rank else (DECAY, GATE)
    logits = gated = x
    for name in decays:
        logits = layer.linear(name, logits)
    for name in gates:
        gated = layer.linear(name, gated)
    logits = split(logits + weights["decay.dt_bias"], width)
    rate = torch.exp(weights["decay.A_log"])[:, None]
    # exp(-rate log(1 + e^x)) is (1 + e^x)^-rate; with a bound, Ling 3.0's.
    bound = options.decay_bound
    alpha = torch.exp(bound * sigmoid(rate * logits)) if bound else (1 + torch.exp(logits)) ** -rate
    o = recurrence(step, q / math.sqrt(width), k, v, beta, alpha)
    gate = split(gated, v.shape[2])
    return layer.linear("o_proj", join(normed(layer, o) * activated(layer, gate)))


def step(S: Tensor, k: Tensor, v: Tensor, beta: Tensor, alpha: Tensor) -> Tensor:
    return (eye(len(k)) - beta * torch.outer(k, k)) @ torch.diag(alpha) @ S + beta * torch.outer(k, v)
