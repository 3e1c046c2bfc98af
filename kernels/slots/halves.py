"""Gated slot attention in two halves: slot keys and slot values pass on together, with one decay.

Legend: T tokens, H heads, K/V key/value head dim, S slots, P stretches of chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunk_table import CHUNK, ChunkTable
from torchlinearmoe.kernels.halves import Done, Halves, Passed, Steps
from torchlinearmoe.kernels.linear.per_channel import Backward, cumulated, prepare, scaled_keys
from torchlinearmoe.kernels.linear.walk import Stream, Walk, rows_ready
from torchlinearmoe.kernels.slots.reads import near_and_far


def forward(
    table: ChunkTable, q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, *, through: bool, scale: float
) -> Steps:
    """q, k: [T, H, K]; v: [T, H, V]; s: [T, H, S] of one type; g: [T, H, S] in fp32. States: [H, S, K], [H, S, V]."""
    q, k, v, s = (rows_ready(x) for x in (q, k, v, s))
    stream = Stream.of(table)
    c = cumulated(g, stream)
    known = scaled_keys(s, c, stream)
    rows, columns = (Walk(stream, 1.0, decay=decay, totals=known[1]) for decay in (2, 3))
    keys, values = rows.summaries(known[0], k), rows.summaries(known[0], v)
    yield Passed([keys.joined(None)[-1], values.joined(None)[-1]], keys.passed() if through else None)
    entering = yield None
    assert entering is not None
    entered_keys, entered_values = keys.joined(entering[0]), values.joined(entering[1])
    pairs = q.new_empty(*q.shape[:2], CHUNK)
    far, _ = columns.outputs(
        q, k, known[0], entered_keys, transposed=True, inside="kept", scores=pairs, dtype=torch.float32
    )
    weights = (scale * near_and_far(s, c, pairs, far, stream)).softmax(-1)
    made = prepare(weights.to(q.dtype), s, c, None, stream, 1.0, known=known)
    o, _ = rows.outputs(made.queries, made.keys, v, entered_values, inside="scores", scores=made.scores)
    return Done((o,), (c, entered_keys, entered_values, weights), forgotten=(4,))


def backward(
    table: ChunkTable, inputs: Sequence[Tensor | None], kept: Sequence[Tensor], do: Tensor, *, scale: float
) -> Steps:
    """The gradients of all inputs."""
    q, k, v, s = (rows_ready(x) for x in inputs[:4] if x is not None)
    c, entered_keys, entered_values, weights = kept
    stream = Stream.of(table)
    values = Backward.of(weights.to(q.dtype), s, v, c, None, do, stream, 1.0)
    rows = values.rows(None)
    into_values = rows.summaries(values.made.queries, values.do)
    # What was read of slot values says, without what comes from behind, the gradient of what was read of slot keys.
    dpairs = torch.empty_like(values.made.scores)
    read = values.read(entered_values, None, dpairs, True)
    dweights = values.queries(read, dpairs).float()
    dread = scale * weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
    keys = Backward.of(dread.to(q.dtype), s, k, c, None, q, stream, 1.0)
    into_keys = rows.summaries(keys.made.queries, keys.do)
    yield Passed([into_keys.joined(None)[-1], into_values.joined(None)[-1]])
    onward = Walk(stream, 1.0, decay=2, totals=keys.made.totals)
    dq, _ = onward.outputs(keys.made.queries, keys.made.keys, k, entered_keys, inside="scores", scores=keys.made.scores)
    dpairs_keys = torch.empty_like(dpairs)
    read_keys = keys.read(entered_keys, None, dpairs_keys, True)
    leaving = yield None
    assert leaving is not None
    left_keys, left_values = into_keys.joined(leaving[0]), into_values.joined(leaving[1])
    dk, dv = keys.values(rows, left_keys), values.values(rows, left_values)
    _, ds, dg, _ = values.rest(read, dpairs, entered_values, left_values, None, None, True)
    _, more_ds, more_dg, _ = keys.rest(read_keys, dpairs_keys, entered_keys, left_keys, None, None, True)
    assert dg is not None and more_dg is not None
    return Done((dq, dk, dv, ds + more_ds, dg + more_dg))


HALVES = Halves(forward, backward, most=128)
