"""The delta rule by our Triton kernels, as two operators of torch.library.

    prepare     scores P, the inverse A of each chunk's system, its products W and U: nothing that depends on states
    walk        from the states that enter stretches, which are joined from summaries where there are several
    gradients   W and U again, for what tokens write and the states; the walk back; then all chunks at once

Kept for the backward pass: the inputs (of a decay per channel its sums in place of it), A and P, of 64 numbers a token
and value head each, and of every 16 or 64 chunks the state that enters and the transition, [K, V] and [K, K]. All else
lives within one pass: W, U, and of the backward pass a state a chunk and its gradient, in the type of the inputs.
Products take that type (float32 as three of TF32) and add up in float32; A is float32 and multiplies as two numbers of
16 bits. What an operator has not got is an empty tensor.

Budget a token and value head of K = V = 128, in bfloat16: forward about 5 KB read and written and 0.34 MFLOP, of which
summaries are a third; backward 12 KB and 0.7 MFLOP. Dependent steps: two products for each chunk of a stretch, one for
each stretch.

Legend: T tokens, H query/key heads, HV value heads, K/V key/value head dim, N segments, M places for chunks, S
stretches, C tokens of a chunk.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunk_table import CHUNK
from torchlinearmoe.kernels.linear.per_channel import cumulated, operand
from torchlinearmoe.kernels.linear.walk import (
    Stream,
    contiguous,
    given,
    left_states,
    measured,
    or_nothing,
    precision,
    product_tile,
    room,
    rows_ready,
    stretches_of,
    strides,
    tile,
)

COLUMNS = 64
"""Of a state of 16 bits: as many as a walk's program holds at most."""
WALK_WARPS, WALK_STAGES = 4, 1
"""With eight, products of 64 tokens that others read would be made twice."""
LONGEST = 64
"""Chunks of a stretch: a transition is as much to store as a state."""
JOIN_COLUMNS, JOIN_WARPS, JOIN_STAGES = 16, 8, 2
PREPARE_WARPS, SPREAD_WARPS, PAIR_WARPS, GRADIENT_WARPS, CHANNEL_WARPS = 8, 4, 4, 4, 8
GRADIENT_COLUMNS, CHANNEL_COLUMNS = 64, 32
CHANNEL_REGISTERS = 128
"""Of a thread: so that a multiprocessor holds two programs, one of which computes while the other waits."""


@torch.library.custom_op("torchlinearmoe::delta_rule", mutates_args=())
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    start: Tensor,
    end: Tensor,
    segment: Tensor,
    first: Tensor,
    scale: float,
    want_final: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o [T, HV, V], the final states [N, HV, K, V], empty where they are not wanted, what enters stretches and their
    transitions, [S, HV, K, V] and [S, HV, K, K], empty where there is one, A and P, [T, HV, C], and the sums of log
    decays in chunks, [T, HV, K], empty unless there is one per channel.

    q, k: [T, H, K]; v: [T, HV, V] of one type; beta: [T, HV], g: [T, HV] or [T, HV, K] and initial: [N, HV, K, V] in
    fp32; start, end, segment: [M], first: [N + 1], a `ChunkTable`.
    """
    call = RuleCall.of(q, k, v, beta, g, Stream(start, end, segment, first, LONGEST), scale)
    made, initial = call.prepared(None), contiguous(initial)
    states, transitions = call.summaries(made, initial) if call.cut else (None, None)
    shape = (first.shape[0] - 1, *v.shape[1:2], q.shape[2], v.shape[2])
    final = left_states(initial, shape, q) if want_final else None
    o = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    call.onward(made, states, initial, leave=final, y=o)
    kept = or_nothing(states, q), or_nothing(transitions, q), made.inverses, made.scores, or_nothing(made.sums, q)
    return o, or_nothing(final, q), *kept


@torch.library.custom_op("torchlinearmoe::delta_rule_backward", mutates_args=())
def delta_rule_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    states: Tensor,
    transitions: Tensor,
    inverses: Tensor,
    scores: Tensor,
    do: Tensor,
    dfinal: Tensor | None,
    start: Tensor,
    end: Tensor,
    segment: Tensor,
    first: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, beta, g and initial (empty without one).

    states, transitions, inverses, scores, and of a decay per channel, as g, its sums: as `delta_rule` gives them.
    """
    call = RuleCall.of(q, k, v, beta, g, Stream(start, end, segment, first, LONGEST), scale)
    made, do = call.prepared((inverses, scores)), rows_ready(do)
    initial, dfinal = contiguous(initial), contiguous(dfinal)
    (_, HV, V), K, M = v.shape, q.shape[2], start.shape[0]
    writes, dwrites = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for _ in range(2))
    inner, dinner = (q.new_empty(M, HV, K, V) for _ in range(2))
    call.onward(made, states if call.cut else None, initial, writes=writes, states=inner)
    dstates = call.summaries_back(made, do, transitions, dfinal) if call.cut else None
    dinitial = None if initial is None else left_states(dfinal, tuple(initial.shape), q)
    call.back(made, do, dstates, dfinal, leave=dinitial, dwrites=dwrites, states=dinner)
    dq, dk, dv, dbeta, dg = call.gradients(made, do, writes, dwrites, inner, dinner)
    return dq, dk, dv, dbeta, or_nothing(dg, q), or_nothing(dinitial, q)


@dataclass(frozen=True)
class Made:
    """What `solve_kernels` make."""

    inverses: Tensor
    """A: [T, HV, C] in fp32."""
    scores: Tensor
    """P: [T, HV, C]."""
    queries: Tensor
    """[T, H, K], or of a decay per channel scale q e^c, [T, HV, K]."""
    keys: Tensor
    """k, or k e^{c_C - c}."""
    erasing: Tensor
    """W: [T, HV, K]."""
    writing: Tensor
    """U: [T, HV, V]."""
    totals: Tensor | None
    """e^{c_C}: [M, HV, K] of a decay per channel; of one per head as `measured` gives it."""
    decays: Tensor | None
    """[6, HV, T] of `measured`, of a decay per head."""
    sums: Tensor | None
    """c: [T, HV, K], of a decay per channel."""


@dataclass(frozen=True)
class RuleCall:
    """What the kernels of one call share."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    """Of a decay per channel its sums, where gradients are made."""
    stream: Stream
    scale: float
    decay: int
    """0 none, 1 per token and head, 2 per channel."""

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, stream: Stream, scale: float
    ) -> RuleCall:
        """With channels that lie side by side."""
        q, k, v, beta, g = rows_ready(q), rows_ready(k), rows_ready(v), beta.contiguous(), contiguous(g)
        return cls(q, k, v, beta, g, stream, scale, 0 if g is None else g.dim() - 1)

    @property
    def groups(self) -> int:
        """Value heads of a query head."""
        return self.v.shape[1] // self.q.shape[1]

    @property
    def cut(self) -> bool:
        """There are several stretches."""
        return self.stream.stretches > 1

    def prepared(self, kept: tuple[Tensor, Tensor] | None) -> Made:
        """A, P, W, U, and of a decay what it makes of queries and keys, or of tokens and chunks; kept: A and P."""
        q, k, stream = self.q, self.k, self.stream
        (T, HV, _), K, M = self.v.shape, q.shape[2], stream.places
        if kept is None:
            inverses, scores = q.new_empty(T, HV, CHUNK, dtype=torch.float32), q.new_empty(T, HV, CHUNK)
        else:
            inverses, scores = kept
        shared = stream.start, stream.end, self.scale, *strides(q), *strides(k)
        queries, keys_in, keys, decays, totals, sums = q, k, k, None, None, None
        if self.decay == 1:
            assert self.g is not None
            decays, totals = measured(self.g, stream, q.dtype)
        if self.decay == 2:
            assert self.g is not None
            sums = cumulated(self.g, stream) if kept is None else self.g
            queries, keys_in, keys = (q.new_empty(T, HV, K) for _ in range(3))
            totals = q.new_empty(M, HV, K, dtype=torch.float32)
            solve_kernels().prepare_channels[M, HV](
                q, k, self.beta, sums, inverses, scores, queries, keys_in, keys, totals, *shared, HV, K, G=self.groups,
                C=CHUNK, B=tile(K, 32), WANT_PAIRS=kept is None, OPERAND=operand(q), PRECISION=precision(q),
                num_warps=CHANNEL_WARPS if kept is None else 4, num_stages=1,
            )  # fmt: skip
        elif kept is None:
            solve_kernels().prepare[M, HV](
                q, k, self.beta, given(decays, q), inverses, scores, *shared, T, HV, K, G=self.groups, C=CHUNK,
                B=self.tile(K, 64), DECAY=self.decay, PRECISION=precision(q), num_warps=PREPARE_WARPS,
                num_stages=_stages(q),
            )  # fmt: skip
        if kept is None:
            solve_kernels().invert[M, HV](
                inverses, stream.start, stream.end, HV, C=CHUNK, DOUBLE=q.dtype == torch.float32, num_warps=1,
                num_stages=1,
            )  # fmt: skip
        erasing, writing = self._spread(inverses, keys_in, decays)
        return Made(inverses, scores, queries, keys, erasing, writing, totals, decays, sums)

    def _spread(self, inverses: Tensor, keys_in: Tensor, decays: Tensor | None) -> tuple[Tensor, Tensor]:
        """W and U."""
        v, stream = self.v, self.stream
        (T, HV, V), K = v.shape, keys_in.shape[2]
        erasing, writing = v.new_empty(T, HV, K), v.new_empty(T, HV, V)
        solve_kernels().spread[stream.places, HV](
            inverses, keys_in, v, self.beta, given(decays, v), erasing, writing, stream.start, stream.end,
            *strides(keys_in), *strides(v), T, HV, K, V, G=self.groups if self.decay < 2 else 1, C=CHUNK,
            BK=self.tile(K, 64), BV=self.tile(V, 64), DECAY=self.decay, PRECISION=precision(v), num_warps=SPREAD_WARPS,
            num_stages=_stages(v),
        )  # fmt: skip
        return erasing, writing

    def summaries(self, made: Made, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """The states that enter stretches, [S, HV, K, V], and their transitions, [S, HV, K, K]."""
        states, transitions = self.summarized(made, initial)
        self.join(states, transitions, reverse=False)
        return states, transitions

    def summarized(self, made: Made, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """The states that leave stretches which nothing enters, and the transitions."""
        HV, V = self.v.shape[1:]
        K, S = self.q.shape[2], self.stream.stretches
        states = self.q.new_empty(S, HV, K, V, dtype=torch.float32)
        transitions = states.new_empty(S, HV, K, K)
        self._walk(made, None, states, initial, transitions=transitions)
        return states, transitions

    def summaries_back(self, made: Made, dy: Tensor, transitions: Tensor, dfinal: Tensor | None) -> Tensor:
        """The gradients of the states that leave stretches."""
        dstates = self.summarized_back(made, dy, dfinal)
        self.join(dstates, transitions, reverse=True)
        return dstates

    def summarized_back(self, made: Made, dy: Tensor, dfinal: Tensor | None) -> Tensor:
        """The gradients of the states that enter stretches, by their own outputs."""
        HV, V = self.v.shape[1:]
        dstates = self.q.new_empty(self.stream.stretches, HV, self.q.shape[2], V, dtype=torch.float32)
        self._walk(made, dy, dstates, dfinal)
        return dstates

    def onward(
        self,
        made: Made,
        entered: Tensor | None,
        initial: Tensor | None,
        *,
        leave: Tensor | None = None,
        y: Tensor | None = None,
        writes: Tensor | None = None,
        states: Tensor | None = None,
    ) -> None:
        """Fill y, or what tokens write and the states that enter chunks."""
        self._walk(made, None, entered, initial, leave=leave, y=y, writes=writes, inner=states)

    def back(
        self,
        made: Made,
        dy: Tensor,
        entered: Tensor | None,
        dfinal: Tensor | None,
        *,
        leave: Tensor | None,
        dwrites: Tensor,
        states: Tensor,
    ) -> None:
        """Fill the gradients of what tokens write and of the states that leave chunks."""
        self._walk(made, dy, entered, dfinal, leave=leave, writes=dwrites, inner=states)

    def _walk(
        self,
        made: Made,
        dy: Tensor | None,
        entered: Tensor | None,
        enter: Tensor | None,
        *,
        leave: Tensor | None = None,
        y: Tensor | None = None,
        writes: Tensor | None = None,
        inner: Tensor | None = None,
        transitions: Tensor | None = None,
    ) -> None:
        """One walk, back where dy is given; a summary where nothing is to be filled."""
        (T, HV, V), K, stream, any_ = self.v.shape, self.q.shape[2], self.stream, self.q
        summary = y is None and writes is None
        BK, BV = self.tiles()
        narrow = any_.dtype != torch.float32
        columns = -(-V // BV) + (-(-K // BV) if transitions is not None else 0)
        keys = made.queries, made.keys, made.erasing
        inputs = (
            given(made.decays, any_), given(made.totals, any_), made.scores, given(entered, any_), given(enter, any_),
            given(leave, any_),
        )  # fmt: skip
        where = *stream.tensors, stream.segments, self.scale, *strides(made.queries), *strides(made.keys)
        chosen: dict[str, Any] = {
            "G": self.groups if self.decay < 2 else 1, "GROUP": stream.group, "C": CHUNK, "BK": BK, "BV": BV,
            "DECAY": self.decay, "HAS_ENTERED": entered is not None and not summary,
            "HAS_ENTER": enter is not None, "WANT_LEAVE": leave is not None, "SUMMARY": summary,
            "PRECISION": precision(self.q), "num_warps": WALK_WARPS if (128 if narrow else 64) >= BK else 8,
            "num_stages": min(WALK_STAGES, _stages(self.q)) if room() >= 220_000 and K <= 128 else 1,
        }  # fmt: skip
        grid = columns, HV, stream.stretches
        if dy is None:
            walk_kernels().onward[grid](
                *keys, made.writing, *inputs, given(y, any_), given(writes, any_), given(inner, any_),
                given(transitions, any_), *where, T, HV, K, V, **chosen, WANT_Y=y is not None,
                WANT_WRITES=writes is not None,
            )  # fmt: skip
        else:
            walk_kernels().back[grid](
                *keys, dy, *inputs, given(writes, any_), given(inner, any_), *where, *strides(dy), T, HV, K, V, **chosen
            )

    def tiles(self) -> tuple[int, int]:
        """Rows and columns of a state that a program holds."""
        K, V = self.q.shape[2], self.v.shape[2]
        wide = 32 if K <= 128 else 16
        return self.tile(K, 256), self.tile(V, wide if self.q.dtype == torch.float32 else COLUMNS if K <= 128 else 64)

    def tile(self, width: int, most: int) -> int:
        """Rows or columns that hold `width`: of 16 bits as `product_tile` has it."""
        return tile(width, most) if self.q.dtype == torch.float32 else product_tile(width, most, self.q)

    def join(
        self,
        states: Tensor,
        transitions: Tensor,
        *,
        reverse: bool,
        enter: Tensor | None = None,
        leave: Tensor | None = None,
    ) -> None:
        """Make of the states that leave stretches, [S, HV, K, any], those that enter them.

        enter, leave: [HV, K, any], what enters the first stretch of the walk, and is filled with what leaves the last.
        """
        S, HV, K, V = states.shape
        BV = tile(V, JOIN_COLUMNS)
        stream = self.stream
        walk_kernels().join[-(-V // BV), HV](
            states, transitions, given(enter, states), given(leave, states), stream.segment, stream.first,
            stream.segments, S, HV, K, V, GROUP=stream.group, BK=tile(K, 256), BV=BV, B=128 if K <= 128 else 32,
            REVERSE=reverse, HAS_ENTER=enter is not None, WANT_LEAVE=leave is not None, num_warps=JOIN_WARPS,
            num_stages=JOIN_STAGES if K <= 128 and room() >= 180_000 else 1,
        )  # fmt: skip

    def gradients(
        self, made: Made, dy: Tensor, writes: Tensor, dwrites: Tensor, states: Tensor, dstates: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Of q, k, v, beta and g."""
        q, k, v, stream = self.q, self.k, self.v, self.stream
        (T, HV, V), (_, H, K), M = v.shape, q.shape, stream.places
        dscores, dlower = (torch.empty_like(made.scores) for _ in range(2))
        dv, rights = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for _ in range(2))
        dbeta = q.new_empty(T, HV, dtype=torch.float32)
        dc = torch.empty_like(dbeta) if self.decay == 1 else None
        dg = None if self.g is None else torch.empty_like(self.g)
        narrow = q.dtype != torch.float32
        gradient_kernels().pair_gradients[M, HV](
            k, v, self.beta, given(made.decays, q), made.inverses, made.scores, dy, writes, dwrites, rights, dscores,
            dlower, dv, dbeta, given(dc, q), stream.start, stream.end, self.scale, *strides(k), *strides(v),
            *strides(dy), T, HV, K, V,
            G=self.groups, C=CHUNK, BK=self.tile(K, 64 if narrow else 32), BV=self.tile(V, 64 if narrow else 32),
            DECAY=self.decay, PRECISION=precision(q), num_warps=PAIR_WARPS, num_stages=_stages(q),
        )  # fmt: skip
        dtype = q.dtype if H == HV else torch.float32
        dq, dk = (torch.empty(T, HV, K, dtype=dtype, device=q.device) for _ in range(2))
        if not narrow:
            BK = tile(K, 16)
        else:
            BK = tile(K, CHANNEL_COLUMNS) if self.decay == 2 else self.tile(K, GRADIENT_COLUMNS)
        tiles = -(-K // BK)
        more, (read, late, left) = dbeta.new_empty(tiles, T, HV), (None, None, None)
        shared = (
            stream.start, stream.end, self.scale, *strides(q), *strides(k), *strides(dy), HV, K, V, T,
        )  # fmt: skip
        chosen: dict[str, Any] = {
            "G": self.groups, "C": CHUNK, "BK": BK, "PRECISION": precision(q),
        }  # fmt: skip
        if self.decay == 2:
            gradient_kernels().channel_gradients[tiles, M, HV](
                q, k, self.beta, made.sums, dscores, dlower, dy, writes, rights, states, dstates, dq, dk, dg, more,
                *shared, **chosen, BV=self.tile(V, 128 if narrow else 32), OPERAND=operand(q), num_warps=CHANNEL_WARPS,
                num_stages=1, maxnreg=CHANNEL_REGISTERS if narrow else None,
            )  # fmt: skip
        else:
            if self.decay == 1:
                read, late, left = torch.empty_like(more), torch.empty_like(more), more.new_empty(tiles, M, HV)
            gradient_kernels().gradients[tiles, M, HV](
                q, k, self.beta, given(made.decays, q), given(made.totals, q), dscores, dlower, dy, writes, rights,
                states, dstates, dq, dk, more, given(read, q), given(late, q), given(left, q), *shared, M,
                BV=self.tile(V, 64 if narrow else 32), DECAY=self.decay, **chosen, num_warps=GRADIENT_WARPS,
                num_stages=_stages(q),
            )  # fmt: skip
        gradient_kernels().sum_tiles[M, HV](
            dbeta, more, given(dc, q), given(read, q), given(late, q), given(left, q), given(dg, q), stream.start,
            stream.end, tiles, HV, T, M, C=CHUNK, DECAY=self.decay, num_warps=1,
        )  # fmt: skip
        if H != HV:
            dq, dk = (x.unflatten(1, (H, -1)).sum(2).to(q.dtype) for x in (dq, dk))
        return dq, dk, dv, dbeta, dg


def _stages(x: Tensor) -> int:
    """Loads ahead: tiles of float32 leave no room for them."""
    return 1 if x.dtype == torch.float32 else 2


@functools.cache
def solve_kernels() -> Any:  # Triton turns numbers into its own constants
    """The module of kernels."""
    return importlib.import_module("torchlinearmoe.kernels.delta.solve_kernels")


@functools.cache
def walk_kernels() -> Any:
    """The module of kernels."""
    return importlib.import_module("torchlinearmoe.kernels.delta.walk_kernels")


@functools.cache
def gradient_kernels() -> Any:
    """The module of kernels."""
    return importlib.import_module("torchlinearmoe.kernels.delta.gradient_kernels")


@delta_rule.register_fake
def _(q, k, v, beta, g, initial, start, end, segment, first, scale, want_final):
    (T, HV, V), K = v.shape, q.shape[2]
    final = q.new_empty((first.shape[0] - 1, HV, K, V) if want_final else (0,), dtype=torch.float32)
    S = stretches_of(start.shape[0], LONGEST)
    states = q.new_empty((S, HV, K, V) if S > 1 else (0,), dtype=torch.float32)
    transitions = q.new_empty((S, HV, K, K) if S > 1 else (0,), dtype=torch.float32)
    pairs = q.new_empty(T, HV, CHUNK, dtype=torch.float32), q.new_empty(T, HV, CHUNK)
    sums = q.new_empty(g.shape if g is not None and g.dim() == 3 else (0,), dtype=torch.float32)
    return q.new_empty(T, HV, V), final, states, transitions, *pairs, sums


@delta_rule_backward.register_fake
def _(q, k, v, beta, g, initial, states, transitions, inverses, scores, do, dfinal, start, end, segment, first, scale):
    dq, dk, dv, dbeta = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, beta))
    dg = q.new_empty((0,) if g is None else g.shape, dtype=torch.float32)
    return dq, dk, dv, dbeta, dg, q.new_empty((0,) if initial is None else initial.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, beta, g, *tensors, ctx.scale, ctx.want_final = inputs
    _, _, *kept, sums = output
    ctx.mark_non_differentiable(*kept, sums)
    ctx.save_for_backward(q, k, v, beta, sums if g is not None and g.dim() == 3 else g, *tensors, *kept)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    q, k, v, beta, g, initial, start, end, segment, first, *kept = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do.to(v.dtype)
    dfinal = None if dfinal is None or not ctx.want_final else dfinal.float()
    dq, dk, dv, dbeta, dg, dinitial = delta_rule_backward(
        q, k, v, beta, g, initial, *kept, do, dfinal, start, end, segment, first, ctx.scale
    )
    return dq, dk, dv, dbeta, None if g is None else dg, None if initial is None else dinitial, *(None,) * 6


delta_rule.register_autograd(_backward, setup_context=_save)
