"""The linear recurrence without a decay, with one per head, or one per token and head, by our Triton kernels.

Two operators of torch.library, forward and backward, so that torch.compile takes them into its graphs. States are kept
for every chunk of 64 tokens while a pass runs, and made again in the backward pass. Matrix products take the type of
the inputs, float32 without TF32, and add up in float32. What an operator has not got is an empty tensor.

Legend: T tokens, H heads, K/V key/value head dim, N segments, M places for chunks.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunk_table import CHUNK, table_of
from torchlinearmoe.kernels.operator import NARROW, Backend
from torchlinearmoe.segments import Segments

LARGEST_TILE = 64


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
    """As `definition.linear_recurrence` for log_decay None, [H] or [T, H], and no bonus."""
    table = table_of(segments)
    decay = None if log_decay is None else log_decay.float().expand(q.shape[:2])
    o, final = per_head(
        q,
        k.to(q.dtype),
        v.to(q.dtype),
        decay,
        initial_state,
        table.start_M,
        table.end_M,
        table.first_N1,
        scale,
        want_final,
    )
    return o, final if want_final else None


@torch.library.custom_op("torchlinearmoe::linear_per_head", mutates_args=())
def per_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    start: Tensor,
    end: Tensor,
    first: Tensor,
    scale: float,
    want_final: bool,
) -> tuple[Tensor, Tensor]:
    """o [T, H, V] and the final states [N, H, K, V], empty where they are not wanted.

    q, k: [T, H, K]; v: [T, H, V] of one type; g: [T, H] and initial: [N, H, K, V] in fp32; start, end: [M], first:
    [N + 1], a `ChunkTable`.
    """
    q, k, v, g, initial = _contiguous(q, k, v, g, initial)
    sizes = _Sizes(q, v, start, first)
    states, final = sizes.enter(k, v, g, initial, start, end, first, want_final)
    o = torch.empty_like(v)
    _kernels().read_chunks[sizes.grid_v](
        q, k, v, _given(g, q), states, o, start, end, scale, *sizes.dims, **sizes.tiles, HAS_G=g is not None
    )
    return o, q.new_empty(0, dtype=torch.float32) if final is None else final


@torch.library.custom_op("torchlinearmoe::linear_per_head_backward", mutates_args=())
def per_head_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    do: Tensor,
    dfinal: Tensor | None,
    start: Tensor,
    end: Tensor,
    first: Tensor,
    scale: float,
    want_dg: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, g (empty where it is not wanted) and initial (empty without one)."""
    q, k, v, g, initial, do, dfinal = _contiguous(q, k, v, g, initial, do, dfinal)
    kernels, sizes = _kernels(), _Sizes(q, v, start, first)
    states, _ = sizes.enter(k, v, g, initial, start, end, first, False)
    dstates = torch.empty_like(states)
    dinitial = q.new_empty(0, dtype=torch.float32) if initial is None else torch.empty_like(initial)
    kernels.leave_chunks[sizes.grid_state](
        q, do, _given(g, q), _given(dfinal, do), dstates, dinitial if initial is not None else dstates,
        start, end, first, scale, *sizes.dims, **sizes.tiles,
        HAS_G=g is not None, HAS_FINAL=dfinal is not None, WANT_INITIAL=initial is not None,
    )  # fmt: skip
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    kernels.query_key_gradients[sizes.grid_k](
        q, k, v, do, _given(g, q), states, dstates, dq, dk, start, end, scale, *sizes.dims, **sizes.tiles,
        HAS_G=g is not None,
    )  # fmt: skip
    kernels.value_gradients[sizes.grid_v](
        q, k, do, _given(g, q), dstates, dv, start, end, scale, *sizes.dims, **sizes.tiles, HAS_G=g is not None
    )
    dg = q.new_empty(0, dtype=torch.float32)
    if g is not None and want_dg:
        dg = torch.empty_like(g)
        kernels.decay_gradients[(sizes.heads, start.shape[0])](
            q, k, v, do, g, states, dstates, dg, start, end, scale, *sizes.dims, **sizes.tiles
        )
    return dq, dk, dv, dg, dinitial


@per_head.register_fake
def _(q, k, v, g, initial, start, end, first, scale, want_final):
    shape = (first.shape[0] - 1, *q.shape[1:], v.shape[2]) if want_final else (0,)
    return torch.empty_like(v, memory_format=torch.contiguous_format), q.new_empty(shape, dtype=torch.float32)


@per_head_backward.register_fake
def _(q, k, v, g, initial, do, dfinal, start, end, first, scale, want_dg):
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dg = q.new_empty(q.shape[:2] if g is not None and want_dg else (0,), dtype=torch.float32)
    return dq, dk, dv, dg, q.new_empty((0,) if initial is None else initial.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale, ctx.want_final = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, g, initial, start, end, first = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do.to(v.dtype)
    dfinal = None if dfinal is None or not ctx.want_final else dfinal.float()
    want_dg = g is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dg, dinitial = per_head_backward(q, k, v, g, initial, do, dfinal, start, end, first, ctx.scale, want_dg)
    return dq, dk, dv, dg if want_dg else None, None if initial is None else dinitial, *(None,) * 5


per_head.register_autograd(_backward, setup_context=_save)


@functools.cache
def _kernels() -> Any:  # Triton turns numbers into its own constants
    return importlib.import_module("torchlinearmoe.kernels.linear.triton_kernels")


class _Sizes:
    """Grids and tiles of a call."""

    def __init__(self, q: Tensor, v: Tensor, start: Tensor, first: Tensor) -> None:
        self.heads, self.K, self.V = q.shape[1], q.shape[2], v.shape[2]
        BK, BV = (max(16, min(LARGEST_TILE, 1 << (width - 1).bit_length())) for width in (self.K, self.V))
        precision = "ieee" if q.dtype == torch.float32 else "tf32"  # of float32 only
        self.dims = self.heads, self.K, self.V
        self.tiles = {"C": CHUNK, "BK": BK, "BV": BV, "PRECISION": precision, "num_warps": 4}
        over_k, over_v = -(-self.K // BK), -(-self.V // BV)
        self.grid_state = over_k * over_v, self.heads, first.shape[0] - 1
        self.grid_k = over_k, self.heads, start.shape[0]
        self.grid_v = over_v, self.heads, start.shape[0]

    def enter(
        self,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        initial: Tensor | None,
        start: Tensor,
        end: Tensor,
        first: Tensor,
        want_final: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The states that enter the chunks, [M, H, K, V] in fp32, and the final ones of the segments."""
        states = k.new_empty(start.shape[0], *self.dims, dtype=torch.float32)
        final = k.new_empty(first.shape[0] - 1, *self.dims, dtype=torch.float32) if want_final else None
        _kernels().enter_chunks[self.grid_state](
            k, v, _given(g, k), _given(initial, k), states, _given(final, k), start, end, first, *self.dims,
            **self.tiles, HAS_G=g is not None, HAS_INITIAL=initial is not None, WANT_FINAL=want_final,
        )  # fmt: skip
        return states, final


def _contiguous(*xs: Any) -> Any:
    return tuple(None if x is None else x.contiguous() for x in xs)


def _given(x: Tensor | None, other: Tensor) -> Tensor:
    """A kernel's pointer; one that it does not use where there is none."""
    return other if x is None else x


BACKEND = Backend(
    "triton",
    linear_recurrence,
    ("identity", "constant", "scalar"),
    order=10,
    dtypes=NARROW,
    devices=frozenset(("cuda",)),
    needs=("triton",),
    install="pip install triton",
    prepare=table_of,
)
