"""Dao and Gu 2024, arXiv 2405.21060: h_t = a_t h_{t-1} + dt_t B_t u_t, y_t = C_t h_t + D u_t."""

from __future__ import annotations

import torch
from definitions.plain import Layer, join, recurrence, rms, softplus, split, spread, swish
from torch import Tensor


def definition(layer: Layer, x: Tensor) -> Tensor:
    options, weights = layer.options, layer.weights
    inner = round(layer.model.hidden_size * options.expand)
    heads = options.heads or inner // (options.head_dim or 64)
    u = split(swish(layer.project("x", x)), inner // heads)
    b, c = (spread(split(swish(layer.project(name, x)), options.state), heads) for name in "bc")
    dt = softplus(layer.linear("dt_proj", x) + weights["decay.dt_bias"])
    decay = torch.exp(-dt * torch.exp(weights["decay.A_log"]))
    y = recurrence(step, c, b, dt[..., None] * u, decay) + weights["decay.D"][:, None] * u
    gated = split(join(y) * swish(layer.linear("z_proj", x)), inner // options.groups)
    return layer.linear("o_proj", join(rms(gated, layer.model.norm_eps)) * weights["norm.weight"])


def step(S: Tensor, b: Tensor, u: Tensor, decay: Tensor) -> Tensor:
    return decay * S + torch.outer(b, u)
