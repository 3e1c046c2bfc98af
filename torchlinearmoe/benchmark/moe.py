"""`benchmark moe`: routed experts from tokens to their weighted sums, dropless, beside plain PyTorch compiled.

PyTorch's contestant sorts, multiplies by `F.grouped_mm` and adds rows by index, as transformers does. The floor is that
of the products, or of the bytes where these take longer.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinearmoe.benchmark.parts import PEER, Part, add_arguments, contest
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.kernels.experts import OPERATOR, budget, routed_experts
from torchlinearmoe.kernels.experts import call as facts
from torchlinearmoe.kernels.operator import Call
from torchlinearmoe.recipe import load_recipe
from torchlinearmoe.recipe.schema import ModelRecipe

__all__ = ["OPERATOR", "add_arguments", "call", "part", "run"]


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Time all and print their table; 1 when nothing was timed."""
    if not load_recipe(arguments.recipe, overrides).model.moe.num_experts:
        raise RecipeError(f"--recipe {arguments.recipe}: has no experts (moe.num_experts = 0)")
    return contest("moe", arguments, overrides)


def call(model: ModelRecipe, device: str, dtype: torch.dtype) -> Call:
    """What a backend is chosen by."""
    return facts(model.hidden_size, model.moe.hidden_size, device, dtype)


def part(
    model: ModelRecipe,
    lengths: tuple[int, ...],
    contestant: str,
    compiled: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Part:
    """Normal tokens that choose evenly at random."""
    moe, tokens, width = model.moe, sum(lengths), model.hidden_size
    ids = torch.rand(tokens, moe.num_experts, device=device).topk(moe.top_k).indices
    weights = torch.randn(tokens, moe.top_k, device=device).softmax(-1)
    x = torch.randn(tokens, width, device=device).to(dtype)
    gate_up = (torch.randn(moe.num_experts, width, 2 * moe.hidden_size, device=device) * width**-0.5).to(dtype)
    down = (torch.randn(moe.num_experts, moe.hidden_size, width, device=device) * moe.hidden_size**-0.5).to(dtype)

    def ours(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return routed_experts(x, ids, weights, gate_up, down, backend=contestant)

    def peers(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return indexed_experts(x, ids, weights, gate_up, down)

    function = peers if contestant == PEER else ours
    fused = contestant == PEER or OPERATOR.find_backends()[contestant].fused
    return Part(
        torch.compile(function) if compiled and fused else function,
        tuple(z.requires_grad_() for z in (x, weights, gate_up, down)),
        budget(tokens, moe.top_k, width, moe.hidden_size, moe.num_experts, dtype.itemsize),
    )


def indexed_experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As `routed_experts`, in plain PyTorch and its own gradients."""
    experts, top_k = gate_up.shape[0], ids.shape[1]
    order = ids.flatten().argsort(stable=True)
    counts = torch.zeros(experts, dtype=torch.int64, device=x.device)
    counts = counts.scatter_add(0, ids.flatten(), torch.ones_like(ids.flatten()))
    offsets = counts.cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(x[order // top_k], gate_up, offs=offsets).chunk(2, -1)
    rows = F.grouped_mm(F.silu(gate) * up, down, offs=offsets)
    rows = rows * weights.flatten()[order].unsqueeze(1).to(rows.dtype)
    return torch.zeros_like(x).index_add(0, order // top_k, rows)
