"""`benchmark loss`: the output head with its cross entropy, beside plain PyTorch compiled, which holds all logits.

The floor is that of the three products. `extra_gib` is the most that was held beside inputs, gradients included.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinearmoe.benchmark.parts import PEER, Part, add_arguments, contest
from torchlinearmoe.kernels.cross_entropy import OPERATOR, budget, chunk_loss, linear_cross_entropy
from torchlinearmoe.kernels.operator import Call
from torchlinearmoe.recipe.schema import ModelRecipe

__all__ = ["OPERATOR", "add_arguments", "call", "part", "run"]


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Time all and print their table; 1 when nothing was timed."""
    return contest("loss", arguments, overrides)


def call(model: ModelRecipe, device: str, dtype: torch.dtype) -> Call:
    """What a backend is chosen by."""
    return Call("cross_entropy", device, dtype)


def part(
    model: ModelRecipe,
    lengths: tuple[int, ...],
    contestant: str,
    compiled: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Part:
    """Normal hidden states, and a weight that gives normal logits."""
    tokens, width, vocab_size = sum(lengths), model.hidden_size, model.vocab_size
    hidden = torch.randn(tokens, width, device=device).to(dtype)
    weight = (torch.randn(vocab_size, width, device=device) * width**-0.5).to(dtype)
    labels = torch.randint(0, vocab_size, (tokens,), device=device)
    kernel = torch.compile(chunk_loss) if compiled else chunk_loss

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, kernel, contestant)

    def peers(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum")

    function = ours if contestant != PEER else torch.compile(peers) if compiled else peers
    inputs = tuple(x.requires_grad_() for x in (hidden, weight))
    return Part(function, inputs, budget(tokens, width, vocab_size, dtype.itemsize))
