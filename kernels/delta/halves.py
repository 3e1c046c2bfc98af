"""The walks of the delta rule in two halves.

Legend: T tokens, H query/key heads, HV value heads, K/V key/value head dim, S stretches of chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunk_table import ChunkTable
from torchlinearmoe.kernels.delta.rule import LONGEST, RuleCall
from torchlinearmoe.kernels.halves import Done, Halves, Passed, Steps, joined, span_of
from torchlinearmoe.kernels.linear.walk import Stream, rows_ready


def forward(
    table: ChunkTable, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, *, through: bool, scale: float
) -> Steps:
    """q, k: [T, H, K]; v: [T, HV, V] of one type; beta: [T, HV] and g: None, [T, HV] or [T, HV, K] in fp32."""
    call = RuleCall.of(q, k, v, beta, g, Stream.of(table, LONGEST), scale)
    made = call.prepared(None)
    summaries, transitions = call.summarized(made, None)
    yield span_of(summaries, transitions, call.join, through)
    entering = yield None
    assert entering is not None
    states, _ = joined(summaries, transitions, call.join, entering[0])
    o = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    call.onward(made, states, None, y=o)
    kept = states, transitions, made.inverses, made.scores
    return Done((o,), kept) if made.sums is None else Done((o,), (*kept, made.sums), forgotten=(4,))


def backward(
    table: ChunkTable, inputs: Sequence[Tensor | None], kept: Sequence[Tensor], do: Tensor, *, scale: float
) -> Steps:
    """The gradients of all inputs."""
    q, k, v, beta, g = inputs
    states, transitions, inverses, scores, *sums = kept
    assert q is not None and k is not None and v is not None and beta is not None
    call, do = RuleCall.of(q, k, v, beta, sums[0] if sums else g, Stream.of(table, LONGEST), scale), rows_ready(do)
    made = call.prepared((inverses, scores))
    summaries = call.summarized_back(made, do, None)
    _, entering = joined(summaries, transitions, call.join, None, reverse=True)
    yield Passed([entering])
    (_, HV, V), K, M = v.shape, q.shape[2], call.stream.places
    writes, dwrites = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for _ in range(2))
    inner, dinner = (q.new_empty(M, HV, K, V) for _ in range(2))
    call.onward(made, states, None, writes=writes, states=inner)
    leaving = yield None
    assert leaving is not None
    dstates, _ = joined(summaries, transitions, call.join, leaving[0], reverse=True)
    call.back(made, do, dstates, None, leave=None, dwrites=dwrites, states=dinner)
    return Done(call.gradients(made, do, writes, dwrites, inner, dinner))


HALVES = Halves(forward, backward, dense=True)
