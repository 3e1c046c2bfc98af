"""Recurrences under context parallelism: LASP-2 (Sun et al. 2025, arXiv 2502.07563) for every form of A.

A rank's span of a row maps the state that enters it to S_out = A S_in + B. Each rank makes (A, B) of the document that
its span ends with, as if nothing entered, and one all-gather a layer brings those of all ranks; folding the ones before
it gives a rank the state that enters its own span:

    1. (A, B) of the span
    2. start the all-gather of [A | B]
    3. what needs no state                                           runs while the states travel
    4. S_in = B_{p-1} + A_{p-1} (B_{p-2} + A_{p-2} (...))            back to where the document started, no further
    5. outputs, from S_in for the document that the span begins with

The size of [A | B] does not depend on the number of tokens. Our kernels do this in two halves (`kernels/halves.py`):
they sum up stretches of the span before they walk through them anyway, and that gives (A, B), and the same on the way
back. So nothing is computed twice. `_InHalves` says in which order.

A backend without halves makes B by a pass over keys and values of its own, B = sum_t decay(t .. end) k_t v_t^T, runs
from an empty state while the gather is under way, and its outputs are corrected, o_t += q_t decay(start .. t) S_in.
Where the op is not linear in the state (slot attention) it runs after step 4, from S_in. A dense A takes no second
pass: K more value columns, zeros, with the identity as their initial state, end as A and make q_t A(start .. t).

Letters: W ranks, R rows, L tokens of a span, T = R L, N documents of this rank, H heads, G heads of the state, K and V
key and value width of a head, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from torchlinearmoe.kernels import delta, dplr, linear, quadratic, slots
from torchlinearmoe.kernels.choose import choose
from torchlinearmoe.kernels.chunk_table import ChunkTable
from torchlinearmoe.kernels.delta.kinds import delta_kind
from torchlinearmoe.kernels.halves import Done, Halves, Steps, finished, open_table
from torchlinearmoe.kernels.heads import repeat_heads, same_heads
from torchlinearmoe.kernels.linear.kinds import linear_kind
from torchlinearmoe.kernels.operator import Call, Operator, outside_graphs
from torchlinearmoe.kernels.quadratic.features import QuadraticFeatures
from torchlinearmoe.kernels.slots.kinds import slot_kind
from torchlinearmoe.layers.past import Spanned
from torchlinearmoe.parallel.exchange.states import StateExchange
from torchlinearmoe.precision import in_float32, wide_type
from torchlinearmoe.segments import Segments

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
    kind = linear_kind(log_decay, bonus, want_final=True)
    if (halves := _halves_of(linear.OPERATOR, kind, q.shape[-1], q, past, backend)) is not None:
        q, k, v, decay_H = same_heads(q, k_G, v_G, decay_G)
        if decay_H is not None:
            decay_H = decay_H.to(wide_type(q.dtype)).expand(*q.shape[: max(2, decay_H.dim())])
        wide_bonus = None if bonus is None else bonus.to(wide_type(q.dtype))
        inputs = q, k.to(q.dtype), v.to(q.dtype), decay_H, wide_bonus
        return _in_halves(halves, inputs, past, times=q.shape[1] // k_G.shape[1], scale=scale)
    decay = None if decay_G is None else Decays(decay_G, past, shifted=bonus is not None)
    write = k_G if decay is None else (in_float32(k_G) * decay.until_last).to(k.dtype)
    exchange = StateExchange(spans, [_written(write, v_G, past)], None if decay is None else decay.total.exp())
    q, k, v, decay_H = same_heads(q, k_G, v_G, decay_G)
    o, _ = linear.linear_recurrence(q, k, v, decay_H, segments=past.segments, scale=scale, bonus=bonus, backend=backend)
    (state,) = exchange.entering()
    return o + scale * _read(q if decay is None else decay.since_first(q), state, past)


@outside_graphs
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    past: Spanned,
    *,
    scale: float,
    backend: str,
) -> Tensor:
    """See `recurrence.delta_rule`, q and k normalised; A is dense."""
    halves = _halves_of(delta.OPERATOR, delta_kind(log_decay), q.shape[-1], q, past, backend)
    if halves is None:
        inputs = q, k, v, beta, log_decay
        return _dense_recurrence(delta.delta_rule, inputs, 2, past, scale=scale, backend=backend)
    wide = wide_type(q.dtype)
    decay = None if log_decay is None else log_decay.to(wide)
    inputs = q, k.to(q.dtype), v.to(q.dtype), beta.to(wide), decay
    return _in_halves(halves, inputs, past, scale=scale)


@outside_graphs
def dplr_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    past: Spanned,
    *,
    scale: float,
    lower_bound: float,
    backend: str,
) -> Tensor:
    """See `recurrence.dplr_rule`; A is dense."""
    halves = _halves_of(dplr.OPERATOR, "dplr", q.shape[-1], q, past, backend)
    options: dict[str, Any] = {"scale": scale, "lower_bound": lower_bound}
    if halves is None:
        return _dense_recurrence(dplr.dplr_rule, (q, k, v, a, b, log_decay), 2, past, **options, backend=backend)
    narrow = (x.to(q.dtype) for x in (k, v, a, b))
    return _in_halves(halves, (q, *narrow, log_decay.to(wide_type(q.dtype))), past, **options)


def _dense_recurrence(
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
    widest = max(x.shape[-1] for x in (k, v, s))
    if (halves := _halves_of(slots.OPERATOR, slot_kind(s.shape[-1]), widest, q, past, backend)) is not None:
        q, k, v, s, decay_H = same_heads(q, k_G, v_G, s_G, decay_G)
        inputs = q, k.to(q.dtype), v.to(q.dtype), s.to(q.dtype), decay_H.to(wide_type(q.dtype))
        return _in_halves(halves, inputs, past, times=q.shape[1] // k_G.shape[1], scale=scale)
    decay = Decays(decay_G, past)
    write = (in_float32(s_G) * decay.until_last).to(k.dtype)
    keys = _written(write, k_G, past)  # [R, G, S, K]: the decay lies on the rows, as in the values
    exchange = StateExchange(spans, [keys, _written(write, v_G, past)], decay.total.exp())
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


def _halves_of(operator: Operator, kind: str, channels: int, q: Tensor, past: Spanned, backend: str) -> Halves | None:
    """Of the backend that computes the call; None where there are none, or the host does not know the spans."""
    if past.spans.routed:
        return None
    chosen = choose(operator, backend, Call(kind, q.device.type, q.dtype, channels, states=True))
    return chosen.in_halves(channels)


def _in_halves(
    halves: Halves, inputs: tuple[Tensor | None, ...], past: Spanned, *, times: int = 1, **options: Any
) -> Tensor:
    """The output [T, H, V]; `times` neighbouring heads have the same states, of which one travels.

    Autograd runs what is recorded last first: on the way back the reduce-scatter starts, `_Between` runs, then the
    reduce-scatter is waited for.
    """
    call = _InHalves(halves, past, options)
    *written, factor, link = _Begin.apply(call, *inputs)  # pyright: ignore[reportGeneralTypeIssues]
    factor = None if factor is None else factor[:, ::times]
    exchange = StateExchange(past.spans, [x[:, ::times] for x in written], factor, halves.dense)
    link = _Between.apply(call, link)
    entering = [repeat_heads(state, times) for state in exchange.entering()]
    return _End.apply(call, link, *entering)  # pyright: ignore[reportReturnType]


@dataclass(eq=False)
class _InHalves:
    """What the nodes of one call share: a generator a row for the direction under way."""

    halves: Halves
    past: Spanned
    options: dict[str, Any]
    inputs: tuple[Tensor | None, ...] = ()
    """Until the forward pass is over."""
    steps: list[Steps] = field(default_factory=list)

    def tables(self) -> list[ChunkTable]:
        """Of the span of every row."""
        return self.past.segments.view("open_tables", self._open_tables)

    def rows_of(self, inputs: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
        """Of inputs, those of each row."""
        rows, length = self.past.spans.rows, self.past.spans.length
        shared = len(inputs) - self.halves.apart
        return [
            [
                x if x is None or index >= shared else x[row * length : (row + 1) * length]
                for index, x in enumerate(inputs)
            ]
            for row in range(rows)
        ]

    def finish(self, states: Sequence[Tensor]) -> list[Done]:
        """The results of every row, from its states [R, H, K, V]."""
        steps, self.steps = self.steps, []
        return [finished(step, [state[row] for state in states]) for row, step in enumerate(steps)]

    def _open_tables(self, segments: Segments) -> list[ChunkTable]:
        spans = self.past.spans
        if spans.rows == 1:
            return [open_table(segments)]
        return [open_table(Segments.of_lengths(lengths, segments.ids.device)) for lengths in spans.row_lengths()]


class _Begin(torch.autograd.Function):
    """B of every row, [R, H, K, V] each, their A, and what ties `_End` to this; backward, the gradients of inputs."""

    @staticmethod
    def forward(ctx, call, *inputs):
        ctx.call, call.inputs = call, inputs
        call.steps = [
            call.halves.forward(table, *row, through=call.past.spans.passed, **call.options)
            for table, row in zip(call.tables(), call.rows_of(inputs))
        ]
        passed: list[Any] = [next(step) for step in call.steps]
        written = [torch.stack(of) for of in zip(*(row.written for row in passed))]
        factor = None if passed[0].factor is None else torch.stack([row.factor for row in passed])
        if factor is not None:
            ctx.mark_non_differentiable(factor)
        return *written, factor, written[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        *dwritten, _, _ = grads
        call: _InHalves = ctx.call
        gradients = list(zip(*(done.results for done in call.finish(dwritten))))
        tokens = len(gradients) - call.halves.apart
        joined = [
            None if of[0] is None else of[0] if len(of) == 1 else torch.cat(of) if index < tokens else sum(of)
            for index, of in enumerate(gradients)
        ]
        return None, *joined


class _Between(torch.autograd.Function):
    """What needs no state, in both directions."""

    @staticmethod
    def forward(ctx, call, link):
        ctx.call = call
        for step in call.steps:
            next(step)
        return link.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        for step in ctx.call.steps:
            next(step)
        return None, grad


class _End(torch.autograd.Function):
    """The output from the states that enter, [R, H, K, V] each; backward, their gradients by this span's outputs."""

    @staticmethod
    def forward(ctx, call, link, *entering):
        done = call.finish(entering)
        inputs, call.inputs = call.inputs, ()
        read = [None if index in done[0].forgotten else x for index, x in enumerate(inputs)]
        ctx.call, ctx.given = call, [x is not None for x in read]
        ctx.save_for_backward(*(x for x in read if x is not None), *(x for row in done for x in row.kept))
        outputs = [row.results[0] for row in done]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, do):  # pyright: ignore[reportIncompatibleMethodOverride]
        call: _InHalves = ctx.call
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if given else None for given in ctx.given]
        kept = list(saved)
        each = len(kept) // call.past.spans.rows
        length = call.past.spans.length
        call.steps = [
            call.halves.backward(
                table, row, kept[each * n : each * (n + 1)], do[length * n : length * (n + 1)], **call.options
            )
            for n, (table, row) in enumerate(zip(call.tables(), call.rows_of(inputs)))
        ]
        passed: list[Any] = [next(step) for step in call.steps]
        return (
            None,
            do.new_zeros((), dtype=torch.float32),
            *(torch.stack(of) for of in zip(*(row.written for row in passed))),
        )


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
