"""Gated slot attention by our Triton kernels of the linear recurrence.

Slot values are a linear recurrence with a decay per channel of its keys, which are the slots. Slot keys have the decay
on the side of their values; what reads them,

    y_t = scale * K_t^T q_t = scale * sum over s <= t of (q_t . k_s) e^{c_t - c_s} s_s,

is what the gradient of the queries is in the recurrence of (queries, keys s, values k) under the cotangent q. So its
gradients are that recurrence itself and the rest of its backward pass.

Legend: T tokens, H heads, K/V key/value head dim, S slots, N segments, M places for chunks, P stretches of chunks.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunk_table import CHUNK, table_of
from torchlinearmoe.kernels.linear import triton as linear
from torchlinearmoe.kernels.linear.per_channel import (
    cumulated,
    per_channel,
    per_channel_backward,
    scaled_keys,
)
from torchlinearmoe.kernels.linear.walk import (
    Stream,
    Walk,
    contiguous,
    left_states,
    or_nothing,
    rows_ready,
    stretches_of,
)
from torchlinearmoe.kernels.operator import NARROW, Backend
from torchlinearmoe.kernels.slots.halves import HALVES
from torchlinearmoe.kernels.slots.kinds import KINDS
from torchlinearmoe.kernels.slots.reads import near_and_far
from torchlinearmoe.segments import Segments


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    log_decay: Tensor,
    scale: float,
    segments: Segments,
    initial_state: tuple[Tensor, Tensor] | None,
    want_final: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """As `definition.slot_attention`."""
    table = table_of(segments)
    stream = table.start_M, table.end_M, table.segment_M, table.first_N1
    k, v, s, g = k.to(q.dtype), v.to(q.dtype), s.to(q.dtype), log_decay.float()
    keys, values = (None, None) if initial_state is None else initial_state
    # Slots know nothing of each other before the softmax, and what channels of keys read adds up.
    reads, finals = [], []
    for slots in _parts(s.shape[-1]):
        found = [
            slot_reads(
                q[..., part],
                k[..., part],
                s[..., slots],
                g[..., slots],
                None if keys is None else keys[:, :, part, slots].transpose(2, 3),
                *stream,
                want_final,
            )
            for part in _parts(q.shape[-1])
        ]
        reads.append(functools.reduce(torch.add, (read for read, *_ in found)))
        finals.append(torch.cat([final for _, final, _ in found], -1) if want_final else None)
    weights = (scale * torch.cat(reads, -1)).softmax(-1).to(q.dtype)
    o, values = linear.linear_recurrence(weights, s, v, g, None, 1.0, segments, values, want_final)
    if values is None:
        return o, None
    return o, (torch.cat(finals, 2).transpose(2, 3), values)


def _parts(width: int) -> list[slice]:
    return [slice(start, start + linear.WIDEST) for start in range(0, width, linear.WIDEST)]


@torch.library.custom_op("torchlinearmoe::slot_reads", mutates_args=())
def slot_reads(
    q: Tensor,
    k: Tensor,
    s: Tensor,
    g: Tensor,
    initial: Tensor | None,
    start: Tensor,
    end: Tensor,
    segment: Tensor,
    first: Tensor,
    want_final: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """K_t^T q_t [T, H, S] in fp32, the final slot keys [N, H, S, K], empty where they are not wanted, and what enters
    stretches, [P, H, S, K].

    q, k: [T, H, K] and s: [T, H, S] of one type; g: [T, H, S] and initial: [N, H, S, K] in fp32; start, end, segment:
    [M], first: [N + 1], a `ChunkTable`.
    """
    q, k, s, initial = rows_ready(q), rows_ready(k), rows_ready(s), contiguous(initial)
    stream = Stream(start, end, segment, first)
    T, H, S = s.shape
    c = cumulated(g, stream)
    keys, totals = scaled_keys(s, c, stream)
    entered = Walk(stream, 1.0, decay=2, totals=totals, enter=initial).states(keys, k)
    final = left_states(initial, (first.shape[0] - 1, H, S, k.shape[2]), q) if want_final else None
    pairs = q.new_empty(T, H, CHUNK)
    walk = Walk(stream, 1.0, decay=3, totals=totals, enter=initial)
    far, _ = walk.outputs(
        q, k, keys, entered, transposed=True, inside="kept", scores=pairs, leave=final, dtype=torch.float32
    )
    return near_and_far(s, c, pairs, far, stream), or_nothing(final, q), or_nothing(entered, q)


@slot_reads.register_fake
def _(q, k, s, g, initial, start, end, segment, first, want_final):
    (T, H, S), K = s.shape, k.shape[2]
    final = q.new_empty((first.shape[0] - 1, H, S, K) if want_final else (0,), dtype=torch.float32)
    stretches = stretches_of(start.shape[0])
    entered = q.new_empty((stretches, H, S, K) if stretches > 1 else (0,), dtype=torch.float32)
    return q.new_empty(T, H, S, dtype=torch.float32), final, entered


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.want_final = inputs
    _, final, entered = output
    ctx.mark_non_differentiable(entered)
    ctx.save_for_backward(*tensors, final)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dread: Tensor | None, dfinal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, s, g, initial, *stream, final = ctx.saved_tensors
    dread = torch.zeros_like(s) if dread is None else dread.to(s.dtype)
    dfinal = None if dfinal is None or not ctx.want_final else dfinal.float()
    dq, _, entered, c = per_channel(dread, s, k, g, None, initial, *stream, 1.0, False)
    _, ds, dk, dg, _, dinitial = per_channel_backward(
        dread, s, k, c, None, initial, entered, final, q, dfinal, *stream, 1.0, ctx.needs_input_grad[3]
    )
    return (
        dq,
        dk,
        ds,
        dg if ctx.needs_input_grad[3] else None,
        None if initial is None else dinitial,
        *(None,) * 5,
    )


slot_reads.register_autograd(_backward, setup_context=_save)


BACKEND = Backend(
    "triton",
    slot_attention,
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
