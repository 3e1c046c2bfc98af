"""The linear recurrence without a decay, or with one per token and head, as walks.

Two operators of torch.library, forward and backward, so that torch.compile takes them into its graphs. One state every
16 chunks of 64 tokens is kept for the backward pass, nothing else beside the inputs. Matrix products take the type of
the inputs, float32 without TF32, and add up in float32. What an operator has not got is an empty tensor.

Legend: T tokens, H heads, K/V key/value head dim, N segments, M places for chunks, S stretches of chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunk_table import CHUNK
from torchlinearmoe.kernels.linear.walk import (
    Stream,
    Walk,
    contiguous,
    given,
    left_states,
    measured,
    or_nothing,
    rows_ready,
    stretches_of,
    tile,
    walk_kernels,
)


@torch.library.custom_op("torchlinearmoe::linear_per_head", mutates_args=())
def per_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    start: Tensor,
    end: Tensor,
    segment: Tensor,
    first: Tensor,
    scale: float,
    want_final: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """o [T, H, V], the final states [N, H, K, V], empty where they are not wanted, and what enters [S, H, K, V].

    q, k: [T, H, K]; v: [T, H, V] of one type; g: [T, H] and initial: [N, H, K, V] in fp32; start, end, segment: [M],
    first: [N + 1], a `ChunkTable`.
    """
    q, k, v = rows_ready(q), rows_ready(k), rows_ready(v)
    stream = Stream(start, end, segment, first)
    decays, totals = (None, None) if g is None else measured(g, stream, q.dtype)
    walk = Walk(stream, scale, False, int(g is not None), decays, totals, contiguous(initial))
    entered = walk.states(k, v)
    final = left_states(walk.enter, (first.shape[0] - 1, *q.shape[1:], v.shape[2]), q) if want_final else None
    o, _ = walk.outputs(q, k, v, entered, leave=final)
    return o, or_nothing(final, q), or_nothing(entered, q)


@torch.library.custom_op("torchlinearmoe::linear_per_head_backward", mutates_args=())
def per_head_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    entered: Tensor,
    final: Tensor,
    do: Tensor,
    dfinal: Tensor | None,
    start: Tensor,
    end: Tensor,
    segment: Tensor,
    first: Tensor,
    scale: float,
    want_dg: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, g (empty where it is not wanted) and initial (empty without one)."""
    q, k, v, do = rows_ready(q), rows_ready(k), rows_ready(v), rows_ready(do)
    stream = Stream(start, end, segment, first)
    decays, totals = (None, None) if g is None else measured(g, stream, q.dtype)
    onward = Walk(stream, scale, False, int(g is not None), decays, totals, contiguous(initial))
    back = Walk(stream, scale, True, int(g is not None), decays, totals, contiguous(dfinal))
    states = entered if entered.numel() else None
    dstates = back.states(q, do)
    dinitial = None if initial is None else left_states(back.enter, tuple(initial.shape), q)
    dq, read = onward.outputs(do, v, k, states, transposed=True, sums_with=q if want_dg else None)
    dk, written = back.outputs(v, do, q, dstates, transposed=True, sums_with=k if want_dg else None)
    dv, _ = back.outputs(k, q, do, dstates, leave=dinitial)
    dg = None
    if want_dg:
        assert read is not None and written is not None
        ended = None if dfinal is None else (final * dfinal).sum((2, 3))
        dg = decay_gradients(read, written, states, dstates, ended, stream)
    return dq, dk, dv, or_nothing(dg, q), or_nothing(dinitial, q)


def decay_gradients(
    read: Tensor,
    written: Tensor,
    states: Tensor | None,
    dstates: Tensor | None,
    ended: Tensor | None,
    stream: Stream,
) -> Tensor:
    """dg [T, H], of sums over tokens of q . dq and k . dk, [tiles, T, H].

    states, dstates: what enters stretches from either side, followed perhaps by what leaves the last one, [S or S + 1,
    H, K, V]; ended: <S, R> at the end of each segment, [N, H].
    """
    _, T, H = read.shape
    K, V = (0, 0) if states is None else states.shape[2:]
    dg = read.new_empty(T, H)
    walk_kernels().decay_gradients[H, stream.stretches](
        read, written, given(states, read), given(dstates, read), given(ended, read), dg, *stream.tensors,
        stream.segments, 0 if states is None else len(states), read.shape[0], written.shape[0], H, K, V, T,
        GROUP=stream.group, C=CHUNK, BX=tile(K, 64), BU=tile(V, 64), HAS_STATES=states is not None,
        HAS_ENDED=ended is not None, num_warps=4,
    )  # fmt: skip
    return dg


@per_head.register_fake
def _(q, k, v, g, initial, start, end, segment, first, scale, want_final):
    (T, H, K), V, places = q.shape, v.shape[2], start.shape[0]
    state = (H, K, V)
    final = q.new_empty((first.shape[0] - 1, *state) if want_final else (0,), dtype=torch.float32)
    S = stretches_of(places)
    entered = q.new_empty((S, *state) if S > 1 else (0,), dtype=torch.float32)
    return v.new_empty(T, H, V), final, entered


@per_head_backward.register_fake
def _(q, k, v, g, initial, entered, final, do, dfinal, start, end, segment, first, scale, want_dg):
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dg = q.new_empty(q.shape[:2] if want_dg else (0,), dtype=torch.float32)
    return dq, dk, dv, dg, q.new_empty((0,) if initial is None else initial.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale, ctx.want_final = inputs
    _, final, entered = output
    ctx.mark_non_differentiable(entered)
    ctx.save_for_backward(*tensors, final, entered)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, g, initial, *stream, final, entered = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do.to(v.dtype)
    dfinal = None if dfinal is None or not ctx.want_final else dfinal.float()
    want_dg = g is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dg, dinitial = per_head_backward(
        q, k, v, g, initial, entered, final, do, dfinal, *stream, ctx.scale, want_dg
    )
    return dq, dk, dv, dg if want_dg else None, None if initial is None else dinitial, *(None,) * 6


per_head.register_autograd(_backward, setup_context=_save)
