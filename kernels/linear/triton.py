"""The linear recurrence by our Triton kernels."""

from __future__ import annotations

from torch import Tensor

from torchlinearmoe.kernels.chunk_table import table_of
from torchlinearmoe.kernels.linear.kinds import KINDS
from torchlinearmoe.kernels.linear.per_channel import per_channel
from torchlinearmoe.kernels.linear.per_head import per_head
from torchlinearmoe.kernels.operator import NARROW, Backend, Call
from torchlinearmoe.segments import Segments


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
    table = table_of(segments)
    stream = table.start_M, table.end_M, table.segment_M, table.first_N1
    k, v = k.to(q.dtype), v.to(q.dtype)
    if log_decay is not None and log_decay.dim() == 3:
        extra = None if bonus is None else bonus.float()
        o, final, _ = per_channel(q, k, v, log_decay.float(), extra, initial_state, *stream, scale, want_final)
    else:
        decay = None if log_decay is None else log_decay.float().expand(q.shape[:2])
        o, final, _ = per_head(q, k, v, decay, initial_state, *stream, scale, want_final)
    return o, final if want_final else None


def at_most(call: Call) -> str | None:
    """Refuses heads that no tile holds."""
    return "it takes keys of at most 512 channels" if call.channels > 512 else None


BACKEND = Backend(
    "triton",
    linear_recurrence,
    KINDS,
    order=10,
    dtypes=NARROW,
    devices=frozenset(("cuda",)),
    needs=("triton",),
    install="pip install triton",
    refuses=at_most,
    prepare=table_of,
)
