"""Recurrences under context parallelism: LASP-2 (Sun et al. 2025, arXiv 2502.07563) for every form of A.

A rank's span of a row maps the state that enters it to S_out = A S_in + B. Each rank makes (A, B) of the document that
its span ends with, as if nothing entered, and one all-gather a layer brings those of all ranks; folding the ones before
it gives a rank the state that enters its own span, and its outputs are corrected by what that state adds:

    1. (A, B) of the span, B = sum_t decay(t .. end) k_t v_t^T
    2. start the all-gather of [A | B]
    3. o_t, with S_in = 0                                            runs while the states travel
    4. S_in = B_{p-1} + A_{p-1} (B_{p-2} + A_{p-2} (...))            back to where the document started, no further
    5. o_t += q_t decay(start .. t) S_in                             for the document that the span begins with

The size of [A | B] does not depend on the number of tokens. Where the op is not linear in the state (slot attention) it
runs after step 4, from S_in. A dense A takes no second pass: K more value columns, zeros, with the identity as their
initial state, end as A and make q_t A(start .. t), which step 5 needs.

Letters: W ranks, R rows, L tokens of a span, T = R L, N documents of this rank, H heads, G heads of the state, K and V
key and value width of a head, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torchlinearmoe.kernels import linear, quadratic, slots
from torchlinearmoe.kernels.heads import repeat_heads, same_heads
from torchlinearmoe.kernels.operator import outside_graphs
from torchlinearmoe.kernels.quadratic.features import QuadraticFeatures
from torchlinearmoe.layers.past import Spanned
from torchlinearmoe.parallel.exchange.states import StateExchange
from torchlinearmoe.precision import in_float32, wide_type

BLOCK = 128
"""Tokens whose decays are summed in one go."""
CHUNK = 256
"""Tokens whose writes are summed in the type of the inputs; the sums are added up in float32."""


@outside_graphs
def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    past: Spanned,
    *,
    scale: float,
    bonus: Tensor | None,
    backend: str,
) -> Tensor:
    """See `recurrence.linear_recurrence`; A is one number, or one for each channel of k."""
    spans = past.spans
    k_G, v_G, decay_G = same_heads(k, v, log_decay)
    decay = None if decay_G is None else Decays(decay_G, past, shifted=bonus is not None)
    write = k_G if decay is None else (in_float32(k_G) * decay.until_last).to(k.dtype)
    exchange = StateExchange(spans, [_written(write, v_G, past)], None if decay is None else decay.total)
    q, k, v, decay_H = same_heads(q, k_G, v_G, decay_G)
    o, _ = linear.linear_recurrence(q, k, v, decay_H, segments=past.segments, scale=scale, bonus=bonus, backend=backend)
    (state,) = exchange.entering()
    return o + scale * _read(q if decay is None else decay.since_first(q), state, past)


@outside_graphs
def dense_recurrence(
    op: Callable[..., Any], inputs: Sequence[Tensor | None], v_index: int, past: Spanned, **options: Any
) -> Tensor:
    """`op` over `inputs` [T, ...], linear in its state [N, H, K, V] and in its values, inputs[v_index]; A is dense."""
    spans, v, q = past.spans, inputs[v_index], inputs[0]
    assert v is not None and q is not None
    H, K, V = v.shape[1], q.shape[-1], v.shape[-1]
    widened = list(inputs)
    widened[v_index] = F.pad(v, (0, K))
    dtype = wide_type(q.dtype)
    identity = F.pad(torch.eye(K, dtype=dtype, device=q.device), (V, 0)).expand(spans.rows, H, K, V + K)
    o, final = op(
        *widened,
        segments=past.segments,
        initial_state=past.first_states(identity),
        want_final=True,
        **options,
    )
    b, a = final.index_select(0, spans.last_R).split((V, K), -1)
    exchange = StateExchange(spans, [b], a, dense=True)
    (state,) = exchange.entering()
    o, passed = o.split((V, K), -1)
    return o + _rows_matmul(passed, state, past)


@outside_graphs
def slot_attention(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, log_decay: Tensor, past: Spanned, *, scale: float, backend: str
) -> Tensor:
    """See `recurrence.slot_attention`; both states have the same A, one number for each slot."""
    spans = past.spans
    k_G, v_G, s_G, decay_G = same_heads(k, v, s, log_decay)
    decay = Decays(decay_G, past)
    write = (in_float32(s_G) * decay.until_last).to(k.dtype)
    keys = _written(write, k_G, past)  # [R, G, S, K]: the decay lies on the rows, as in the values
    exchange = StateExchange(spans, [keys, _written(write, v_G, past)], decay.total)
    keys, values = exchange.entering()
    q, k, v, s, decay_H = same_heads(q, k_G, v_G, s_G, decay_G)
    times = q.shape[1] // keys.shape[1]
    keys, values = (past.first_states(repeat_heads(x, times)) for x in (keys.transpose(-1, -2), values))
    o, _ = slots.slot_attention(
        q,
        k,
        v,
        s,
        decay_H,
        segments=past.segments,
        scale=scale,
        initial_state=(keys, values),
        backend=backend,
    )
    return o


@outside_graphs
def quadratic_attention(
    q: Tensor, k: Tensor, v: Tensor, past: Spanned, *, kind: str, eps: float, backend: str
) -> Tensor:
    """See `recurrence.quadratic_attention`; A is 1. Numerators and denominators are corrected, then divided."""
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    o, final = quadratic.quadratic_attention(
        q, k, v, segments=past.segments, kind=kind, normalize=False, want_final=True, backend=backend
    )
    assert final is not None
    (state,) = StateExchange(past.spans, [final.index_select(0, past.spans.last_R)], None).entering()
    phi = QuadraticFeatures(kind, q.shape[-1], q.shape[-1] ** -0.5, q.device)
    # Features are many times as wide as queries: the backward pass makes them once more.
    passed = checkpoint(
        lambda q, state: _read(phi.features(q), state, past), q, state, use_reentrant=False, preserve_rng_state=False
    )
    wide = in_float32(o) + in_float32(passed)
    return (wide[..., :-1] / (wide[..., -1:] + eps)).to(q.dtype)


class Decays:
    """Decays of the tokens [T, G] or [T, G, K], or [G] for the same at every token, summed in log space, float32.

    `shifted`: outputs are read before a token's own decay.
    """

    def __init__(self, log_decay: Tensor, past: Spanned, shifted: bool = False) -> None:
        spans, self.past = past.spans, past
        wide = in_float32(log_decay)
        wide = wide.expand(past.segments.tokens, -1) if wide.dim() == 1 else wide
        rows = spans.by_row(wide)  # [R, L, G] or [R, L, G, K]
        since, until = running_sums(rows), running_sums(rows, reverse=True)
        self.total = until[:, 0]
        if rows.dim() == 3:
            since, until, self.total = since.unsqueeze(-1), until.unsqueeze(-1), self.total.unsqueeze(-1)
        since = F.pad(since, (0, 0, 0, 0, 1, 0))[:, :-1] if shifted else since
        self._since = spans.in_stream(since)
        self.until_last = spans.in_stream(F.pad(until, (0, 0, 0, 0, 0, 1))[:, 1:]).exp()
        """[T, G, 1 or K]: from after each token to the end of its row's span."""

    def since_first(self, q: Tensor) -> Tensor:
        """q [T, H, K], decayed since the start of its row's span."""
        decay = repeat_heads(self._since.exp(), q.shape[1] // self._since.shape[1])
        return (in_float32(q) * decay).to(q.dtype)


def running_sums(x: Tensor, reverse: bool = False) -> Tensor:
    """x [R, L, ...] summed up to each token, or from it on, within its row.

    By blocks of BLOCK tokens, then over blocks: along a whole row PyTorch adds with one thread a channel.
    """
    length, flat = x.shape[1], [0, 0] * (x.dim() - 2)
    blocks = (F.pad(x, (*flat, 0, -length % BLOCK)) if length % BLOCK else x).unflatten(1, (-1, BLOCK))
    totals = blocks.sum(2)
    if reverse:
        inside = blocks.flip(2).cumsum(2).flip(2)
        others = F.pad(totals.flip(1).cumsum(1).flip(1)[:, 1:], (*flat, 0, 1))
    else:
        inside = blocks.cumsum(2)
        others = F.pad(totals.cumsum(1)[:, :-1], (*flat, 1, 0))
    return (inside + others.unsqueeze(2)).flatten(1, 2)[:, :length]


def _written(k: Tensor, v: Tensor, past: Spanned) -> Tensor:
    """sum_t k_t v_t^T over the document that each row's span ends with, k decayed already: [R, G, K, V] in float32."""
    spans = past.spans
    last = spans.in_last(past.segments.ids).view(-1, 1, 1)
    k, v = (spans.by_row(x) for x in (torch.where(last, k, 0.0), v))
    if k.dtype in (torch.float32, torch.float64):
        return torch.einsum("rlgk,rlgv->rgkv", k, v)
    k, v = (F.pad(x, (0, 0, 0, 0, 0, -spans.length % CHUNK)).unflatten(1, (-1, CHUNK)) for x in (k, v))
    return torch.einsum("rmlgk,rmlgv->rmgkv", k, v).float().sum(1)


def _read(q: Tensor, state: Tensor, past: Spanned) -> Tensor:
    """q^T S [T, H, V] for the document that each row's span begins with, zeros for others; state: [R, G, K, V]."""
    return _rows_matmul(torch.where(past.spans.in_first(past.segments.ids).view(-1, 1, 1), q, 0.0), state, past)


def _rows_matmul(q: Tensor, state: Tensor, past: Spanned) -> Tensor:
    """q [T, H, K] times the state [R, G, K, V] of its row, [T, H, V] in q's type."""
    rows = past.spans.by_row(q)
    state = repeat_heads(state, q.shape[1] // state.shape[1])
    return past.spans.in_stream(torch.einsum("rlhk,rhkv->rlhv", rows, state.to(q.dtype)))
