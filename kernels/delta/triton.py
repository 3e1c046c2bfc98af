"""The delta rule by our Triton kernels."""

from __future__ import annotations

from torch import Tensor

from torchlinearmoe.kernels.chunk_table import table_of
from torchlinearmoe.kernels.delta import rule
from torchlinearmoe.kernels.delta.halves import HALVES
from torchlinearmoe.kernels.delta.kinds import KINDS
from torchlinearmoe.kernels.flash_linear import at_most_256_channels
from torchlinearmoe.kernels.operator import NARROW, Backend
from torchlinearmoe.segments import Segments


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    segments: Segments,
    initial_state: Tensor | None,
    want_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `definition.delta_rule`."""
    table = table_of(segments)
    stream = table.start_M, table.end_M, table.segment_M, table.first_N1
    k, v, g = k.to(q.dtype), v.to(q.dtype), None if log_decay is None else log_decay.float()
    o, final, *_ = rule.delta_rule(q, k, v, beta.float(), g, initial_state, *stream, scale, want_final)
    return o, final if want_final else None


BACKEND = Backend(
    "triton",
    delta_rule,
    KINDS,
    order=40,
    dtypes=NARROW,
    devices=frozenset(("cuda",)),
    needs=("triton",),
    install="pip install triton",
    refuses=at_most_256_channels,
    graphed=True,
    prepare=table_of,
    halves=HALVES,
)
