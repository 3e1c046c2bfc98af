"""`benchmark attention`: causal softmax attention of packed documents, beside SDPA compiled on them as a batch.

Heads are the recipe's. The floor is that of the pairs that see each other, or of the bytes where these take longer.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinearmoe.benchmark.parts import PEER, Part, add_arguments, contest
from torchlinearmoe.documents import Documents
from torchlinearmoe.kernels.attention import OPERATOR, budget, packed_attention
from torchlinearmoe.kernels.attention import call as facts
from torchlinearmoe.kernels.operator import Call
from torchlinearmoe.recipe.schema import ModelRecipe

__all__ = ["OPERATOR", "add_arguments", "call", "part", "run"]


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Time all and print their table; 1 when nothing was timed."""
    return contest("attention", arguments, overrides)


def call(model: ModelRecipe, device: str, dtype: torch.dtype) -> Call:
    """What a backend is chosen by."""
    return facts(0, head_width(model), device, dtype)


def head_width(model: ModelRecipe) -> int:
    """Channels of a head."""
    return model.head_dim or model.hidden_size // model.num_heads


def part(
    model: ModelRecipe,
    lengths: tuple[int, ...],
    contestant: str,
    compiled: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Part:
    """Normal queries, keys and values, of documents of one length."""
    (length,), heads, groups, width = set(lengths), model.num_heads, model.num_kv_heads, head_width(model)
    documents, scale = Documents.batch(len(lengths), length, device), width**-0.5
    q, k, v = (torch.randn(sum(lengths), h, width, device=device).to(dtype) for h in (heads, groups, groups))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, documents, scale=scale, backend=contestant)

    def peers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (len(lengths), length)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=heads != groups)
        return out.transpose(1, 2).flatten(0, 1)

    function = ours if contestant != PEER else torch.compile(peers) if compiled else peers
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    return Part(function, inputs, budget(lengths, heads, groups, width, width, 0, dtype.itemsize))
