"""The linear recurrence with a decay per channel, and RWKV6's bonus, as walks over scaled queries and keys.

Operators of torch.library as in `per_head`. Scaled queries and keys, and the scores inside chunks, are made again in
the backward pass.

Legend: T tokens, H heads, K/V key/value head dim, N segments, M places for chunks, S stretches of chunks.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
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
    or_nothing,
    precision,
    rows_ready,
    stretches_of,
    strides,
    tile,
)


@torch.library.custom_op("torchlinearmoe::linear_per_channel", mutates_args=())
def per_channel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    bonus: Tensor | None,
    initial: Tensor | None,
    start: Tensor,
    end: Tensor,
    segment: Tensor,
    first: Tensor,
    scale: float,
    want_final: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o [T, H, V], the final states [N, H, K, V], empty where they are not wanted, what enters stretches, [S, H, K, V],
    and the sums c of log decays in chunks, [T, H, K].

    q, k: [T, H, K]; v: [T, H, V] of one type; g: [T, H, K], bonus: [H, K] and initial: [N, H, K, V] in fp32; start,
    end, segment: [M], first: [N + 1], a `ChunkTable`.
    """
    q, k, v = rows_ready(q), rows_ready(k), rows_ready(v)
    stream = Stream(start, end, segment, first)
    c = cumulated(g, stream)
    made = prepare(q, k, c, bonus, stream, scale)
    walk = Walk(stream, 1.0, decay=2, totals=made.totals, enter=contiguous(initial))
    entered = walk.states(made.keys, v)
    final = left_states(walk.enter, (first.shape[0] - 1, *q.shape[1:], v.shape[2]), q) if want_final else None
    o, _ = walk.outputs(made.queries, made.keys, v, entered, inside="scores", scores=made.scores, leave=final)
    return o, or_nothing(final, q), or_nothing(entered, q), c


@torch.library.custom_op("torchlinearmoe::linear_per_channel_backward", mutates_args=())
def per_channel_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Tensor,
    bonus: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, g (empty where it is not wanted), bonus and initial (empty without one)."""
    stream = Stream(start, end, segment, first)
    back = Backward.of(q, k, v, c, bonus, do, stream, scale)
    initial, dfinal = contiguous(initial), contiguous(dfinal)
    states = entered if entered.numel() else None
    rows = back.rows(dfinal)
    dstates = rows.states(back.made.queries, back.do)
    dinitial = None if initial is None else left_states(dfinal, tuple(initial.shape), q)
    dv = back.values(rows, dstates, dinitial)
    dpairs = back.made.scores  # not read again
    read = back.read(states, initial, dpairs, want_dg)
    ended = None if dfinal is None or not want_dg else (final * dfinal).sum(3)
    dq, dk, dg, dbonus = back.rest(read, dpairs, states, dstates, dfinal, ended, want_dg)
    return dq, dk, dv, or_nothing(dg, q), or_nothing(dbonus, q), or_nothing(dinitial, q)


@dataclass(frozen=True)
class Backward:
    """The steps of a backward pass."""

    q: Tensor
    k: Tensor
    v: Tensor
    c: Tensor
    bonus: Tensor | None
    do: Tensor
    stream: Stream
    scale: float
    made: Made

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, c: Tensor, bonus: Tensor | None, do: Tensor, stream: Stream, scale: float
    ) -> Backward:
        """With channels that lie side by side."""
        q, k, v, do = rows_ready(q), rows_ready(k), rows_ready(v), do.contiguous()
        return cls(q, k, v, c, bonus, do, stream, scale, prepare(q, k, c, bonus, stream, scale))

    def rows(self, dfinal: Tensor | None) -> Walk:
        """The walk back, decays on the rows of states."""
        return Walk(self.stream, 1.0, reverse=True, decay=2, totals=self.made.totals, enter=dfinal)

    def values(self, rows: Walk, dstates: Tensor | None, leave: Tensor | None = None) -> Tensor:
        """dv."""
        made = self.made
        return rows.outputs(
            made.keys, made.queries, self.do, dstates, inside="scores", scores=made.scores, leave=leave
        )[0]  # fmt: skip

    def read(self, states: Tensor | None, initial: Tensor | None, dpairs: Tensor, sums: bool) -> _Walked:
        """The gradient of `Made.queries`, and that of the scores to dpairs [T, H, C]."""
        onward = Walk(self.stream, 1.0, decay=3, totals=self.made.totals, enter=initial)
        return onward.outputs(
            self.do, self.v, self.made.keys, states, transposed=True, inside="kept", scores=dpairs,
            sums_with=self.made.queries if sums else None, sums="chunks",
        )  # fmt: skip

    def rest(
        self,
        read: _Walked,
        dpairs: Tensor,
        states: Tensor | None,
        dstates: Tensor | None,
        dfinal: Tensor | None,
        ended: Tensor | None,
        want_dg: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """dq, dk, dg and dbonus. What enters stretches may be followed by what leaves the last one."""
        stream, (_, H, K) = self.stream, self.q.shape
        back = Walk(stream, 1.0, reverse=True, decay=3, totals=self.made.totals, enter=dfinal)
        dkeys, written = back.outputs(
            self.v, self.do, self.made.queries, dstates, transposed=True, inside="nothing",
            sums_with=self.made.keys if want_dg else None, sums="chunks",
        )  # fmt: skip
        passing = None
        if want_dg:
            assert read[1] is not None and written is not None
            passing, B = torch.empty_like(written), tile(K, 128)
            channel_kernels().passing_of_chunks[-(-K // B), H, stream.stretches](
                read[1], written, given(states, written), given(dstates, written), given(ended, written), passing,
                stream.segment, stream.first, stream.segments, 0 if states is None else len(states), H, K,
                self.v.shape[2], GROUP=stream.group, B=B, BV=tile(self.v.shape[2], 32),
                HAS_STATES=states is not None, HAS_ENDED=ended is not None, num_warps=4,
            )  # fmt: skip
        return self.pairs(dpairs, read[0], dkeys, passing, want_dg)

    def queries(self, read: _Walked, dpairs: Tensor) -> Tensor:
        """dq alone."""
        return self.pairs(dpairs, read[0], None, None, False)[0]

    def pairs(
        self, dpairs: Tensor, dqueries: Tensor, dkeys: Tensor | None, passing: Tensor | None, want_dg: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """dq, dk (not filled without dkeys), dg and dbonus from the gradients of what `prepare` makes."""
        q, k, bonus, stream, (_, H, K) = self.q, self.k, self.bonus, self.stream, self.q.shape
        dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
        dg = torch.empty_like(self.c) if want_dg else None
        # Places without chunks stay zero.
        dbonus = None if bonus is None else q.new_zeros(stream.places, H, K, dtype=torch.float32)
        B = tile(K, 32)
        channel_kernels().channel_gradients[-(-K // B), stream.places, H](
            q, k, self.c, given(contiguous(bonus), q), dpairs, dqueries, given(dkeys, q), given(passing, q), dq, dk,
            given(dg, q), given(dbonus, q), stream.start, stream.end, self.scale, *strides(q), *strides(k), H, K,
            C=CHUNK, B=B, BONUS=bonus is not None, WANT_DK=dkeys is not None, WANT_DG=want_dg, OPERAND=operand(q),
            PRECISION=precision(q), num_warps=4, num_stages=1,
        )  # fmt: skip
        return dq, dk, dg, None if dbonus is None else dbonus.sum(0)


_Walked = tuple[Tensor, Tensor | None]
"""Outputs of a walk, and its sums."""


def cumulated(g: Tensor, stream: Stream) -> Tensor:
    """Sums of log decays g [T, H, K] in chunks, in base 2."""
    c = torch.empty(g.shape, dtype=torch.float32, device=g.device)
    D = g.shape[1] * g.shape[2]
    B = tile(D, 64)
    channel_kernels().cumulate[-(-D // B), stream.places](
        g.contiguous(), c, stream.start, stream.end, D, C=CHUNK, B=B, num_warps=4
    )
    return c


@dataclass(frozen=True)
class Made:
    """What `prepare_channels` makes."""

    queries: Tensor
    """scale q e^{c'}: [T, H, K]."""
    keys: Tensor
    """k e^{c_C - c}: [T, H, K]."""
    totals: Tensor
    """e^{c_C}: [M, H, K]."""
    scores: Tensor
    """[T, H, C]."""


def prepare(
    q: Tensor,
    k: Tensor,
    c: Tensor,
    bonus: Tensor | None,
    stream: Stream,
    scale: float,
    known: tuple[Tensor, Tensor] | None = None,
) -> Made:
    """All of it; known: what `scaled_keys` gives."""
    keys, totals = _keys_for(k, stream) if known is None else known
    made = Made(
        torch.empty(q.shape, dtype=q.dtype, device=q.device), keys, totals, q.new_empty(*q.shape[:2], CHUNK)
    )  # fmt: skip
    _prepare(q, k, c, bonus, made, stream, scale, WANT_KEYS=known is None, WANT_SCORES=True)
    return made


def scaled_keys(k: Tensor, c: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
    """`Made.keys` and `Made.totals` alone."""
    keys, totals = _keys_for(k, stream)
    _prepare(k, k, c, None, Made(keys, keys, totals, keys), stream, 1.0, WANT_KEYS=True, WANT_SCORES=False)
    return keys, totals


def _keys_for(k: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
    keys = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    return keys, k.new_empty(stream.places, *k.shape[1:], dtype=torch.float32)


def _prepare(
    q: Tensor, k: Tensor, c: Tensor, bonus: Tensor | None, made: Made, stream: Stream, scale: float, **wanted: bool
) -> None:
    (_, H, K) = q.shape
    channel_kernels().prepare_channels[stream.places, H](
        q, k, c, given(contiguous(bonus), q), made.queries, made.keys, made.totals, made.scores,
        stream.start, stream.end, scale, *strides(q), *strides(k), H, K, C=CHUNK, B=tile(K, 32),
        BONUS=bonus is not None, **wanted, OPERAND=operand(q), PRECISION=precision(q), num_warps=4, num_stages=1,
    )  # fmt: skip


def operand(x: Tensor) -> Any:
    """The type of products of what is scaled up and down: float16 has not the range."""
    import triton.language as tl

    return tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float32


@functools.cache
def channel_kernels() -> Any:
    """The module of kernels."""
    return importlib.import_module("torchlinearmoe.kernels.linear.channel_kernels")


@per_channel.register_fake
def _(q, k, v, g, bonus, initial, start, end, segment, first, scale, want_final):
    (T, H, K), V, places = q.shape, v.shape[2], start.shape[0]
    state = (H, K, V)
    final = q.new_empty((first.shape[0] - 1, *state) if want_final else (0,), dtype=torch.float32)
    S = stretches_of(places)
    entered = q.new_empty((S, *state) if S > 1 else (0,), dtype=torch.float32)
    return v.new_empty(T, H, V), final, entered, torch.empty_like(g, memory_format=torch.contiguous_format)


@per_channel_backward.register_fake
def _(q, k, v, c, bonus, initial, entered, final, do, dfinal, start, end, segment, first, scale, want_dg):
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dg = q.new_empty(c.shape if want_dg else (0,), dtype=torch.float32)
    dbonus = q.new_empty((0,) if bonus is None else bonus.shape, dtype=torch.float32)
    return dq, dk, dv, dg, dbonus, q.new_empty((0,) if initial is None else initial.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, _, *tensors, ctx.scale, ctx.want_final = inputs
    _, final, entered, c = output
    ctx.mark_non_differentiable(entered, c)
    ctx.save_for_backward(q, k, v, *tensors, final, entered, c)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    q, k, v, bonus, initial, *stream, final, entered, c = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do.to(v.dtype)
    dfinal = None if dfinal is None or not ctx.want_final else dfinal.float()
    want_dg = ctx.needs_input_grad[3]
    dq, dk, dv, dg, dbonus, dinitial = per_channel_backward(
        q, k, v, c, bonus, initial, entered, final, do, dfinal, *stream, ctx.scale, want_dg
    )
    return (
        dq,
        dk,
        dv,
        dg if want_dg else None,
        None if bonus is None else dbonus,
        None if initial is None else dinitial,
        *(None,) * 6,
    )


per_channel.register_autograd(_backward, setup_context=_save)
