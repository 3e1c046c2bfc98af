"""State space duality by our Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunk_table import table_of
from torchlinearmoe.kernels.operator import NARROW, Backend
from torchlinearmoe.kernels.ssd.dual import dual
from torchlinearmoe.segments import Segments

WIDEST = 128
"""Rows of a state that one walk takes: wider ones go in parts."""


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    segments: Segments,
    initial_state: Tensor | None,
    want_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `definition.ssd`."""
    if B.shape[-1] > WIDEST:  # rows of the state know nothing of each other, and outputs add up
        rows = [slice(start, start + WIDEST) for start in range(0, B.shape[-1], WIDEST)]
        states = [None if initial_state is None else initial_state[:, :, part] for part in rows]
        found = [
            ssd(x, dt, A, B[..., part], C[..., part], segments, state, want_final) for part, state in zip(rows, states)
        ]
        finals = [final for _, final in found if final is not None]
        return torch.stack([y.float() for y, _ in found]).sum(0).to(x.dtype), torch.cat(finals, 2) if finals else None
    table = table_of(segments)
    stream = table.start_M, table.end_M, table.segment_M, table.first_N1
    B, C = B.to(x.dtype), C.to(x.dtype)
    y, final, _ = dual(x, dt.float(), A.float(), B, C, initial_state, *stream, want_final)
    return y, final if want_final else None


BACKEND = Backend(
    "triton",
    ssd,
    ("ssd",),
    order=40,
    dtypes=NARROW,
    devices=frozenset(("cuda",)),
    needs=("triton",),
    install="pip install triton",
    graphed=True,
    prepare=table_of,
)
