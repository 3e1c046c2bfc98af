"""DeepSeek-AI 2024, arXiv 2405.04434, section 2.1; pairs (2n, 2n + 1) are rotated, as in the published weights."""

from __future__ import annotations

import math

import torch
from definitions.plain import Layer, join, rms, sigmoid, softmax, split, turned
from torch import Tensor

EPS = 1e-6
"""Of the latents' norms, whatever the model's own."""


def definition(layer: Layer, x: Tensor) -> Tensor:
    options = layer.options
    n, r, width, latent = options.head_dim, options.qk_rope_head_dim, options.v_head_dim, options.kv_lora_rank

    def normed(y: Tensor, name: str) -> Tensor:
        return rms(y, EPS) * layer.weights[f"{name}.weight"]

    def placed(y: Tensor) -> Tensor:
        if not options.rope:
            return y
        real, imaginary = turned(y[..., ::2], y[..., 1::2], layer.model.rope_theta)
        return torch.stack([real, imaginary], -1).flatten(-2)

    if options.q_lora_rank:
        q = layer.linear("q_b_proj", normed(layer.linear("q_a_proj", x), "q_a_norm"))
    else:
        q = layer.linear("q_proj", x)
    both = layer.linear("kv_a_proj", x)
    up = split(layer.linear("kv_b_proj", normed(both[:, :latent], "kv_a_norm")), n + width)
    q, k_r = split(q, n + r), placed(both[:, latent:])
    q = torch.cat([q[..., :n], placed(q[..., n:])], -1)
    heads = []
    for h in range(layer.heads):
        k, v = torch.cat([up[:, h, :n], k_r], 1), up[:, h, n:]
        o = [softmax(k[: t + 1] @ q[t, h] / math.sqrt(n + r)) @ v[: t + 1] for t in range(x.shape[0])]
        heads.append(torch.stack(o))
    o = torch.stack(heads, 1)
    if options.output_gate == "head":  # Ling 3.0
        o = o * sigmoid(layer.linear("g_proj", x))[:, :, None]
    return layer.linear("o_proj", join(o))
