"""Diagonal plus low rank transitions by our Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunk_table import table_of
from torchlinearmoe.kernels.dplr.halves import HALVES
from torchlinearmoe.kernels.dplr.rule import dplr, levels_of
from torchlinearmoe.kernels.operator import NARROW, Backend, Call
from torchlinearmoe.segments import Segments

WIDEST = 128
"""Rows of a state that a program walks with."""
ROOMY = ((8, 0), (9, 0), (10, 0), (10, 3))
"""Chips whose programs may take the 144 KiB of shared memory that the gradients of float32 want; others have 99."""


def dplr_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    lower_bound: float | None,
    scale: float,
    segments: Segments,
    initial_state: Tensor | None,
    want_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `definition.dplr_rule`; no log decay is below `lower_bound`, and without one those below -20 count as -20."""
    table = table_of(segments)
    stream = table.start_M, table.end_M, table.segment_M, table.first_N1
    k, v, a, b = (x.to(q.dtype) for x in (k, v, a, b))
    o, final, *_ = dplr(
        q, k, v, a, b, log_decay.float(), initial_state, *stream, scale, levels_of(lower_bound), want_final
    )
    return o, final if want_final else None


def _refuses(call: Call) -> str | None:
    if call.channels > WIDEST:
        return f"it takes keys of at most {WIDEST} channels"
    if call.dtype == torch.float32 and torch.cuda.is_available() and torch.cuda.get_device_capability() not in ROOMY:
        return "float32 takes 144 KiB of shared memory, which this GPU has not"
    return None


BACKEND = Backend(
    "triton",
    dplr_rule,
    ("dplr",),
    order=40,
    dtypes=NARROW,
    devices=frozenset(("cuda",)),
    needs=("triton",),
    install="pip install triton",
    refuses=_refuses,
    graphed=True,
    prepare=table_of,
    halves=HALVES,
)
