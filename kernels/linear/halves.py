"""The walks of the linear recurrence in two halves: a span says its state after its stretches are summarised.

Legend: T tokens, H heads, K/V key/value head dim, M places for chunks, S stretches of chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunk_table import ChunkTable
from torchlinearmoe.kernels.halves import Done, Halves, Passed, Steps, side_by_side
from torchlinearmoe.kernels.linear.per_channel import Backward, cumulated, prepare, scaled_keys
from torchlinearmoe.kernels.linear.per_head import decay_gradients
from torchlinearmoe.kernels.linear.walk import Stream, Walk, measured, rows_ready

WIDEST = 128
"""Columns of a state that one walk takes."""


def forward(
    table: ChunkTable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    *,
    through: bool,
    scale: float,
) -> Steps:
    """q, k: [T, H, K]; v: [T, H, V] of one type; g: None, [T, H] or [T, H, K] and bonus: [H, K] in fp32."""
    stream, widths = Stream.of(table), _widths(v)
    q, k, g = rows_ready(q), rows_ready(k), None if g is None else g.contiguous()
    parts = [
        _forward(stream, q, k, rows_ready(part), g, through, scale)
        if g is None or g.dim() == 2
        else _forward_channels(stream, q, k, rows_ready(part), g, bonus, through, scale)
        for part in v.split(widths, -1)
    ]
    return (yield from side_by_side(parts, widths, _joined))


def backward(
    table: ChunkTable,
    inputs: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    do: Tensor,
    *,
    scale: float,
) -> Steps:
    """The gradients of all inputs."""
    q, k, v, g, bonus = inputs
    assert q is not None and k is not None and v is not None
    stream, widths = Stream.of(table), _widths(v)
    q, k, g = rows_ready(q), rows_ready(k), None if g is None else g.contiguous()
    each = len(kept) // len(widths)  # of decays per channel their sums too
    parts: list[Steps] = []
    for number, (part, dpart) in enumerate(zip(v.split(widths, -1), do.split(widths, -1))):
        own = kept[number * each : (number + 1) * each]
        part, dpart = rows_ready(part), rows_ready(dpart)
        if each == 1:
            parts.append(_backward(stream, q, k, part, g, own[0], dpart, scale))
        else:
            parts.append(_backward_channels(stream, q, k, part, bonus, own[0], own[1], dpart, scale))
    return (yield from side_by_side(parts, widths, _summed))


def _widths(v: Tensor) -> list[int]:
    whole, rest = divmod(v.shape[-1], WIDEST)
    return [WIDEST] * whole + [rest] * (rest > 0)


def _joined(parts: Sequence[Done]) -> Done:
    (outputs,) = zip(*(part.results for part in parts))
    return Done((torch.cat(outputs, -1),), tuple(x for part in parts for x in part.kept), parts[0].forgotten)


def _summed(parts: Sequence[Done]) -> Done:
    """Gradients of q, k, v, g, bonus: all but v's add up."""
    named = zip(*(part.results for part in parts))
    return Done(
        tuple(
            torch.cat(of, -1) if index == 2 else None if of[0] is None else torch.stack(of).sum(0)
            for index, of in enumerate(named)
        )
    )


def _forward(stream: Stream, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, through: bool, scale: float) -> Steps:
    decays, totals = (None, None) if g is None else measured(g, stream, q.dtype)
    walk = Walk(stream, scale, False, int(g is not None), decays, totals)
    summaries = walk.summaries(k, v)
    yield Passed([summaries.joined(None)[-1]], summaries.passed() if through else None)
    entering = yield None
    assert entering is not None
    entered = summaries.joined(*entering)
    o, _ = walk.outputs(q, k, v, entered)
    return Done((o,), (entered,))


def _backward(
    stream: Stream, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, entered: Tensor, do: Tensor, scale: float
) -> Steps:
    decays, totals = (None, None) if g is None else measured(g, stream, q.dtype)
    onward = Walk(stream, scale, False, int(g is not None), decays, totals)
    back = Walk(stream, scale, True, int(g is not None), decays, totals)
    summaries = back.summaries(q, do)
    yield Passed([summaries.joined(None)[-1]])
    dq, read = onward.outputs(do, v, k, entered, transposed=True, sums_with=None if g is None else q)
    leaving = yield None
    assert leaving is not None
    dstates = summaries.joined(*leaving)
    dk, written = back.outputs(v, do, q, dstates, transposed=True, sums_with=None if g is None else k)
    dv, _ = back.outputs(k, q, do, dstates)
    dg = None
    if read is not None and written is not None:
        dg = decay_gradients(read, written, entered, dstates, None, stream)
    return Done((dq, dk, dv, dg, None))


def _forward_channels(
    stream: Stream, q: Tensor, k: Tensor, v: Tensor, g: Tensor, bonus: Tensor | None, through: bool, scale: float
) -> Steps:
    c = cumulated(g, stream)
    keys = scaled_keys(k, c, stream)
    walk = Walk(stream, 1.0, decay=2, totals=keys[1])
    summaries = walk.summaries(keys[0], v)
    yield Passed([summaries.joined(None)[-1]], summaries.passed() if through else None)
    made = prepare(q, k, c, bonus, stream, scale, known=keys)
    entering = yield None
    assert entering is not None
    entered = summaries.joined(*entering)
    o, _ = walk.outputs(made.queries, made.keys, v, entered, inside="scores", scores=made.scores)
    return Done((o,), (c, entered), forgotten=(3,))


def _backward_channels(
    stream: Stream,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bonus: Tensor | None,
    c: Tensor,
    entered: Tensor,
    do: Tensor,
    scale: float,
) -> Steps:
    back = Backward.of(q, k, v, c, bonus, do, stream, scale)
    rows = back.rows(None)
    summaries = rows.summaries(back.made.queries, back.do)
    yield Passed([summaries.joined(None)[-1]])
    dpairs = torch.empty_like(back.made.scores)
    read = back.read(entered, None, dpairs, True)
    leaving = yield None
    assert leaving is not None
    dstates = summaries.joined(*leaving)
    dv = back.values(rows, dstates)
    dq, dk, dg, dbonus = back.rest(read, dpairs, entered, dstates, None, None, True)
    return Done((dq, dk, dv, dg, dbonus))


HALVES = Halves(forward, backward, apart=1, most=WIDEST)
