"""State space duality as the linear recurrence that it is, by any of its backends."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from torchlinearmoe.kernels.heads import repeat_heads
from torchlinearmoe.kernels.operator import Backend, Call
from torchlinearmoe.segments import Segments


def as_recurrence(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys [T, G, K], values [T, H, V] and log decays [T, H] of the same recurrence."""
    return C, B, (x * dt.unsqueeze(-1)).to(x.dtype), dt * A


def lowered(backend: Backend) -> Backend:
    """A backend of the linear recurrence as one of `ssd`."""

    def run(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        segments: Segments,
        initial_state: Tensor | None,
        want_final: bool,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v, log_decay = as_recurrence(x, dt, A, B, C)
        times = x.shape[1] // B.shape[1]
        q, k = (repeat_heads(part, times) for part in (q, k))
        return backend.run(q, k, v, log_decay, None, 1.0, segments, initial_state, want_final)

    def refuses(call: Call) -> str | None:
        return backend.refuses(replace(call, kind="scalar"))

    defects = tuple(replace(d, kinds=frozenset(("ssd",))) for d in backend.defects if "scalar" in d.kinds)
    return replace(backend, run=run, kinds=("ssd",), refuses=refuses, defects=defects)
