"""The walks of DPLR in two halves.

Legend: T tokens, H heads, K/V key/value head dim, S stretches of chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torchlinearmoe.kernels.chunk_table import ChunkTable
from torchlinearmoe.kernels.dplr.rule import chunks_of, gradients, levels_of, output
from torchlinearmoe.kernels.halves import Done, Halves, Passed, Steps, joined, span_of
from torchlinearmoe.kernels.linear.per_channel import cumulated
from torchlinearmoe.kernels.linear.walk import Stream, rows_ready


def forward(
    table: ChunkTable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    *,
    through: bool,
    scale: float,
    lower_bound: float | None,
) -> Steps:
    """q, k, a, b: [T, H, K]; v: [T, H, V] of one type; g: [T, H, K] in fp32."""
    q, k, v, a, b = (rows_ready(x) for x in (q, k, v, a, b))
    stream = Stream.of(table)
    c = cumulated(g, stream)
    chunks = chunks_of(q, k, a, b, c, stream, scale, levels_of(lower_bound), back=False)
    onward = chunks.onward(v, None)
    summaries, transitions = onward.summarized(None)
    yield span_of(summaries, transitions, onward.join, through)
    entering = yield None
    assert entering is not None
    entered, _ = joined(summaries, transitions, onward.join, entering[0])
    states, x = onward.walk(entered, None)
    o = output(chunks.q_in, states, chunks.qk, v, chunks.qb, x, stream, transposed=False)
    return Done((o,), (c, entered, transitions), forgotten=(5,))


def backward(
    table: ChunkTable,
    inputs: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    do: Tensor,
    *,
    scale: float,
    lower_bound: float | None,
) -> Steps:
    """The gradients of all inputs."""
    q, k, v, a, b = (rows_ready(x) for x in inputs[:5] if x is not None)
    c, entered, transitions = kept
    do, stream, levels = rows_ready(do), Stream.of(table), levels_of(lower_bound)
    chunks = chunks_of(q, k, a, b, c, stream, scale, levels, back=True)
    back = chunks.back(do, None)
    summaries, _ = back.summarized(transitions)
    _, entering = joined(summaries, transitions, back.join, None, reverse=True)
    yield Passed([entering])
    states, x = chunks.onward(v, None).walk(entered, None)
    leaving = yield None
    assert leaving is not None
    left, _ = joined(summaries, transitions, back.join, leaving[0], reverse=True)
    dstates, r = back.walk(left, None)
    dq, dk, dv, da, db, dg = gradients(q, k, v, a, b, c, do, chunks, states, x, dstates, r, scale, levels, True)
    return Done((dq, dk, dv, da, db, dg))


HALVES = Halves(forward, backward, dense=True, most=128)
