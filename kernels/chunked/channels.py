"""Decays per channel inside a chunk: the scores of everything that reads against everything that writes.

A family names its readers (queries, or the vectors with which a delta rule reads the state that it changes) and its
writers (keys). All pairs are scored at once, because they share the decays: by halving, or by sub-blocks while
torch.compile traces.

Legend: R readers, W writers, B rows, H heads, M chunks a row, C tokens a chunk, K channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunked.decay import FLOOR, decay_factor, running_sum
from torchlinearmoe.kernels.chunked.halving import halved_scores
from torchlinearmoe.kernels.chunked.layout import Layout
from torchlinearmoe.kernels.chunked.subblocks import SIZE as SUBBLOCK
from torchlinearmoe.kernels.chunked.subblocks import subblock_scores


@dataclass(frozen=True)
class Reader:
    """Something that reads the state at every token."""

    x: Tensor
    """[B, H, M, C, K], fp32 or fp64."""
    own: tuple[Tensor, ...] | None = None
    """None: reads after its own token's decay and write. Else it reads before them, and this is its score against its
    own token's writers, [B, H, M, C] each."""


@dataclass(frozen=True)
class ChannelScores:
    """What `score_channels` returns; documents are masked, readers and writers follow `Chunks`' rules for q and k."""

    scores: list[list[Tensor]]
    """[reader][writer]: [B, H, M, C, C], lower triangular."""
    entered: list[Tensor]
    """Every reader, decayed since its document entered the chunk: [B, H, M, C, K]."""
    leaving: list[Tensor]
    """Every writer, decayed until its document leaves the chunk."""
    log_total: Tensor
    """[B, H, M, K]: the log decay over a whole chunk."""
    prefix: Tensor | None
    """[B, H, M, C, K]: the decay since the document entered the chunk; only where states go in or out."""


def score_channels(
    layout: Layout, readers: list[Reader], writers: list[Tensor], log_decay: Tensor, matmul_dtype: torch.dtype
) -> ChannelScores:
    """Score all pairs. writers, log_decay: [B, H, M, C, K] in fp32 or fp64; the scores come in `matmul_dtype`."""
    if torch.compiler.is_compiling() and layout.C % SUBBLOCK == 0:
        scores, entered, leaving = _by_subblocks(readers, writers, log_decay, matmul_dtype)
    else:
        scores, entered, leaving = _by_halving(readers, writers, log_decay, matmul_dtype)
    scores = [[pair * layout.documents.same_MCC for pair in row] for row in scores]
    prefix = None
    if layout.edges is not None:
        prefix, before, suffix = document_decays(layout, log_decay)
        entered = [reader.x * (prefix if reader.own is None else before) for reader in readers]
        leaving = [k * suffix for k in writers]
    return ChannelScores(scores, entered, leaving, log_decay.clamp(min=FLOOR).sum(-2), prefix)


def _by_halving(
    readers: list[Reader], writers: list[Tensor], log_decay: Tensor, matmul_dtype: torch.dtype
) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor]]:
    decay = decay_factor(log_decay, log_decay.dtype)
    first = [reader.x * decay if reader.own is None else reader.x for reader in readers]
    own = [_stack(reader.own or [(reader.x * k).sum(-1) for k in writers]) for reader in readers]
    scores, entered, leaving = halved_scores(_stack(first), _stack(writers), decay, _stack(own), matmul_dtype)
    return [list(row.unbind()) for row in scores.unbind()], list(entered.unbind()), list(leaving.unbind())


def _stack(xs: Sequence[Tensor]) -> Tensor:
    """torch.stack without a copy of a single tensor."""
    return xs[0].unsqueeze(0) if len(xs) == 1 else torch.stack(tuple(xs))


def _by_subblocks(
    readers: list[Reader], writers: list[Tensor], log_decay: Tensor, matmul_dtype: torch.dtype
) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor]]:
    results = [
        [
            subblock_scores(reader.x, k, log_decay, None if reader.own is None else reader.own[j], matmul_dtype)
            for j, k in enumerate(writers)
        ]
        for reader in readers
    ]
    scores = [[pair[0] for pair in row] for row in results]
    return scores, [row[0][1] for row in results], [pair[2] for pair in results[0]]


def document_decays(layout: Layout, log_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decays since a token's document entered the chunk (its own included, excluded), and until it leaves."""
    total = running_sum(log_C, -2)
    before = torch.cat([torch.zeros_like(total[..., :1, :]), total[..., :-1, :]], -2)
    first = layout.documents.first_MC.unsqueeze(-1).expand(total.shape)
    final = layout.documents.final_MC.unsqueeze(-1).expand(total.shape)
    since, until = before.gather(-2, first), total.gather(-2, final)
    return (
        decay_factor(total - since, log_C.dtype),
        decay_factor(before - since, log_C.dtype),
        decay_factor(until - total, log_C.dtype),
    )
