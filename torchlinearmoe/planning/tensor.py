"""What tensor parallelism sends, read off the model as it was split.

Per micro-batch, for every mixer and dense feed-forward (a shared expert is one): the hidden states of all ranks are
gathered before it and its partial sums are reduce-scattered after it; the backward does the same the other way round.
The embedding is a reduce-scatter, the head a gather, and the reverse of each in the backward. Norms that span heads
all-reduce a number a token, forward and backward, the loss gathers two numbers a token and rank. After the last
micro-batch the gradients of which each rank has a part are all-reduced together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from torchlinearmoe.kernels.cross_entropy.chunked import chunk_rows
from torchlinearmoe.layers.mlp import FeedForward, NoFeedForward
from torchlinearmoe.layers.norm import RMSNorm
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.parallel.activation_checkpointing import is_checkpointed
from torchlinearmoe.parallel.tensor import is_split, partial_gradients
from torchlinearmoe.recipe.schema import TrainingRecipe

Add = Callable[[str, int, str, int, int], None]
"""(axis, ranks, operation, how many, bytes of each)."""


def add_tensor_collectives(
    model: Decoder,
    training: TrainingRecipe,
    ranks: int,
    tokens: int,
    dtype: torch.dtype,
    forwards: int,
    backwards: int,
    add: Add,
) -> None:
    """Add a step of `forwards` and `backwards` micro-batches of `tokens` tokens, split over `ranks` ranks."""
    width, number = model.recipe.hidden_size, tokens * torch.float32.itemsize
    parts = len(model.layers) + sum(isinstance(module, FeedForward) for module in model.modules())
    hidden = tokens * width * dtype.itemsize
    first, last = int(model.holds_first), int(model.holds_last)
    for direction, passes, gathered, scattered in (
        ("forward", forwards, last, first),
        ("backward", backwards, first, last),
    ):
        # Besides the layers: the head gathers, the embedding scatters, and each does the reverse in the backward.
        add("tensor", ranks, f"all-gather, tokens {direction}", (parts + gathered) * passes, hidden)
        add("tensor", ranks, f"reduce-scatter, tokens {direction}", (parts + scattered) * passes, hidden)
        add("tensor", ranks, f"all-reduce, norms {direction}", _spanning_norms(model) * passes, number)
    again = [layer for index, layer in model.layers.items() if is_checkpointed(training, int(index))]
    for layer in again:
        # The last sum of a layer is not computed again: nothing in its backward asks for it. It is the mixer's where no
        # feed-forward follows. A norm behind it asks.
        gathers = 1 + sum(isinstance(module, FeedForward) for module in layer.modules())
        add("tensor", ranks, "all-gather, tokens forward", gathers * backwards, hidden)
        if training.activation_checkpointing == "full":
            sums = backwards * (gathers if layer.norms_behind else not isinstance(layer.ffn, NoFeedForward))
            add("tensor", ranks, "reduce-scatter, tokens forward", sums, hidden)
            add("tensor", ranks, "all-reduce, norms forward", _spanning_norms(layer) * backwards, number)
    rows = chunk_rows(tokens, model.recipe.vocab_size // ranks)
    for start in range(0, tokens if model.holds_last else 0, rows):
        chunk = min(rows, tokens - start)
        add("tensor", ranks, "all-gather, loss", forwards, 2 * ranks * chunk * torch.float32.itemsize)
    local = sum(gradient.to_local().numel() for gradient in partial_gradients(model))
    add("tensor", ranks, "all-reduce, gradients", 1, local * torch.float32.itemsize)


def _spanning_norms(module: nn.Module) -> int:
    """Norms whose mean square is taken over the heads of all ranks."""
    return sum(bool(is_split(part.weight)) for part in module.modules() if isinstance(part, RMSNorm))
