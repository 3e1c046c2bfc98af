"""The linear recurrence by our Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunk_table import table_of
from torchlinearmoe.kernels.linear.halves import HALVES
from torchlinearmoe.kernels.linear.kinds import KINDS
from torchlinearmoe.kernels.linear.per_channel import per_channel
from torchlinearmoe.kernels.linear.per_head import per_head
from torchlinearmoe.kernels.operator import NARROW, Backend
from torchlinearmoe.segments import Segments

WIDEST = 128
"""Rows or columns of a state that one walk takes: wider ones go in parts. A tile of 256 rows ended in an illegal memory
access on Hopper with Triton 3.6."""


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    segments: Segments,
    initial_state: Tensor | None,
    want_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `definition.linear_recurrence`."""
    if v.shape[-1] > WIDEST:  # columns of the state know nothing of each other
        parts = v.split(WIDEST, -1)
        states = [None] * len(parts) if initial_state is None else initial_state.split(WIDEST, -1)
        found = [
            linear_recurrence(q, k, part, log_decay, bonus, scale, segments, state, want_final)
            for part, state in zip(parts, states)
        ]
        return torch.cat([o for o, _ in found], -1), _joined(found, -1)
    if q.shape[-1] > WIDEST:  # nor do rows, and outputs add up
        width = q.shape[-1]
        starts = range(0, width, WIDEST)
        found = [
            linear_recurrence(
                q[..., start : start + WIDEST],
                k[..., start : start + WIDEST],
                v,
                log_decay[..., start : start + WIDEST] if log_decay is not None and log_decay.dim() == 3 else log_decay,
                None if bonus is None else bonus[:, start : start + WIDEST],
                scale,
                segments,
                None if initial_state is None else initial_state[:, :, start : start + WIDEST],
                want_final,
            )
            for start in starts
        ]
        return torch.stack([o.float() for o, _ in found]).sum(0).to(q.dtype), _joined(found, 2)
    table = table_of(segments)
    stream = table.start_M, table.end_M, table.segment_M, table.first_N1
    k, v = k.to(q.dtype), v.to(q.dtype)
    if log_decay is not None and log_decay.dim() == 3:
        extra = None if bonus is None else bonus.float()
        o, final, *_ = per_channel(q, k, v, log_decay.float(), extra, initial_state, *stream, scale, want_final)
    else:
        decay = None if log_decay is None else log_decay.float().expand(q.shape[:2])
        o, final, _ = per_head(q, k, v, decay, initial_state, *stream, scale, want_final)
    return o, final if want_final else None


def _joined(found: list[tuple[Tensor, Tensor | None]], dim: int) -> Tensor | None:
    finals = [final for _, final in found if final is not None]
    return torch.cat(finals, dim) if finals else None


BACKEND = Backend(
    "triton",
    linear_recurrence,
    KINDS,
    order=40,
    dtypes=NARROW,
    devices=frozenset(("cuda",)),
    needs=("triton",),
    install="pip install triton",
    graphed=True,
    prepare=table_of,
    halves=HALVES,
)
