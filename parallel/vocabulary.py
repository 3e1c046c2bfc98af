"""The vocabulary split over tensor-parallel ranks: embedding, output head and cross entropy.

Each of the P ranks holds V / P rows of the embedding and of the head. The embedding looks up the rows it has for all
tokens and leaves zeros elsewhere; the ranks' sum is the embedding, of which each keeps its tokens. The head takes all
tokens and makes V / P logits of each; the loss needs no others, only two numbers a token of every rank, so no rank ever
holds all logits.

T tokens of all ranks together, C tokens of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlinearmoe.kernels.cross_entropy import IGNORED
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.parallel.exchange.collectives import gather_rows, scatter_rows
from torchlinearmoe.precision import in_float32


def split_vocabulary(model: Decoder, group: str, rank: int, ranks: int) -> None:
    """Make the embedding and the head of `model`, where it holds them, work on this rank's rows."""
    rows = model.recipe.vocab_size // ranks
    first = rank * rows
    if model.holds_first:
        model.embed.forward = partial(embed_rows, model.embed, first=first, rows=rows, group=group)  # pyright: ignore
    if not model.holds_last:
        return
    split = SplitLoss(first, group, ranks)
    model.head.kernel, model.head.backend, model.head.hits = split.chunk_loss, "torch", split.chunk_hits

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        h_TD, *rest = args
        return (gather_rows(h_TD, group), *rest)

    def leave(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """All logits where logits were asked for; a loss is complete as it is."""
        return gather_rows(output.t(), group).t() if output.dim() else output

    model.head.register_forward_pre_hook(enter)
    model.head.register_forward_hook(leave)


def embed_rows(embed: nn.Embedding, tokens: Tensor, *, first: int, rows: int, group: str) -> Tensor:
    """Tokens [T] -> embeddings of this rank's tokens [T / P, D]; rows first .. first + rows - 1 are looked up here."""
    row = tokens - first
    elsewhere = (row < 0) | (row >= rows)
    x_TD = F.embedding(row.masked_fill(elsewhere, 0), embed.weight)
    return scatter_rows(x_TD.masked_fill(elsewhere.unsqueeze(1), 0), group)


class SplitLoss:
    """Cross entropy from this rank's logits, first .. first + V / P - 1."""

    def __init__(self, first: int, group: str, ranks: int) -> None:
        self.first, self.group, self.ranks = first, group, ranks

    def chunk_loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Summed cross entropy of a chunk, the same on every rank, and its gradient by this rank's logits [C, V / P].

        As `kernels.cross_entropy.chunk_loss`. log sum exp over all logits is that of the ranks' own log sum exps; the
        label's logit is on one rank, and zero on the others.
        """
        wide = in_float32(logits)
        valid = labels != IGNORED
        hot = torch.arange(logits.shape[-1], device=logits.device) == (labels - self.first)[:, None]
        own = torch.stack((wide.logsumexp(-1), torch.where(hot, wide, 0).sum(-1)))
        log_totals, targets = gather_rows(own, self.group).view(self.ranks, 2, -1).unbind(1)
        log_total = log_totals.logsumexp(0)
        gradient = (torch.exp(wide - log_total[:, None]) - hot.to(wide.dtype)) * valid[:, None]
        return torch.where(valid, log_total - targets.sum(0), 0).sum(), gradient.to(logits.dtype)

    def chunk_hits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """How many labels of a chunk are the most probable token of all, the same on every rank."""
        best, place = logits.double().max(-1)  # float64 holds any id
        found = gather_rows(torch.stack((best, (place + self.first).double())), self.group)
        every_best, ids = found.view(self.ranks, 2, -1).unbind(1)
        chosen = ids.gather(0, every_best.argmax(0, keepdim=True)).squeeze(0)
        return (chosen == labels).sum()
