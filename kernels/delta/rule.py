"""The delta rule by our Triton kernels, as two operators of torch.library.

    prepare     scores P, the inverse A of each chunk's system, its products W and U: nothing that depends on states
    walk        from the states that enter stretches, which are joined from summaries where there are several
    gradients   all of that again, for what tokens write and the states; the walk back; then all chunks at once

Kept for the backward pass: the inputs, and of every 16 or 32 chunks the state that enters and the transition, [K, V]
and [K, K]. All else lives within one pass: A, P, W, U, and of the backward pass a state a chunk and its gradient, in
the type of the inputs. Products take that type (float32 as three of TF32) and add up in float32; A is float32 and
multiplies as two numbers of 16 bits. What an operator has not got is an empty tensor.

Budget a token and value head of K = V = 128, in bfloat16: forward about 5.5 KB read and written and 0.34 MFLOP, of
which summaries are a third; backward 13 KB and 0.7 MFLOP. Dependent steps: two products for each chunk of a stretch,
one for each stretch.

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
    or_nothing,
    precision,
    product_tile,
    rows_ready,
    stretches_of,
    strides,
    tile,
)

COLUMNS = 128
"""Of a state of 16 bits: as many as a walk's program holds at most."""
WALK_WARPS, WALK_STAGES = 8, 2
JOIN_COLUMNS, JOIN_WARPS, JOIN_STAGES = 16, 8, 2
SPREAD_WARPS, PAIR_WARPS, GRADIENT_WARPS, CHANNEL_WARPS = 4, 4, 4, 8
GRADIENT_COLUMNS = 64


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o [T, HV, V], the final states [N, HV, K, V], empty where they are not wanted, and what enters stretches and
    their transitions, [S, HV, K, V] and [S, HV, K, K], empty where there is one.

    q, k: [T, H, K]; v: [T, HV, V] of one type; beta: [T, HV], g: [T, HV] or [T, HV, K] and initial: [N, HV, K, V] in
    fp32; start, end, segment: [M], first: [N + 1], a `ChunkTable`.
    """
    call = RuleCall.of(q, k, v, beta, g, Stream(start, end, segment, first), scale)
    made, initial = call.prepared(), contiguous(initial)
    states, transitions = call.summaries(made, initial) if call.cut else (None, None)
    shape = (first.shape[0] - 1, *v.shape[1:2], q.shape[2], v.shape[2])
    final = left_states(initial, shape, q) if want_final else None
    o = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    call.onward(made, states, initial, leave=final, y=o)
    return o, or_nothing(final, q), or_nothing(states, q), or_nothing(transitions, q)


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
    do: Tensor,
    dfinal: Tensor | None,
    start: Tensor,
    end: Tensor,
    segment: Tensor,
    first: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, beta, g and initial (empty without one); states, transitions: as `delta_rule` gives
    them."""
    call = RuleCall.of(q, k, v, beta, g, Stream(start, end, segment, first), scale)
    made, do = call.prepared(), rows_ready(do)
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
    sums: Tensor | None = None
    """c: [T, HV, K], of a decay per channel."""
    totals: Tensor | None = None
    """e^{c_C}: [M, HV, K], of a decay per channel."""


@dataclass(frozen=True)
class RuleCall:
    """What the kernels of one call share."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
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

    def prepared(self) -> Made:
        """A, P, W, U, and of a decay per channel what it makes of queries and keys."""
        q, k, stream = self.q, self.k, self.stream
        (T, HV, _), K, M = self.v.shape, q.shape[2], stream.places
        inverses, scores = q.new_empty(T, HV, CHUNK, dtype=torch.float32), q.new_empty(T, HV, CHUNK)
        shared = stream.start, stream.end, self.scale, *strides(q), *strides(k), HV, K
        if self.decay < 2:
            solve_kernels().prepare[M, HV](
                q, k, self.beta, given(self.g, q), inverses, scores, *shared, G=self.groups, C=CHUNK,
                B=self.tile(K, 64), DECAY=self.decay, PRECISION=precision(q), num_warps=4, num_stages=_stages(q),
            )  # fmt: skip
            return self._solved(inverses, scores, q, k, k)
        assert self.g is not None
        sums = cumulated(self.g, stream)
        queries, keys_in, keys = (q.new_empty(T, HV, K) for _ in range(3))
        totals = q.new_empty(M, HV, K, dtype=torch.float32)
        solve_kernels().prepare_channels[M, HV](
            q, k, self.beta, sums, inverses, scores, queries, keys_in, keys, totals, *shared, G=self.groups, C=CHUNK,
            B=tile(K, 32), OPERAND=operand(q), PRECISION=precision(q), num_warps=CHANNEL_WARPS, num_stages=1,
        )  # fmt: skip
        return self._solved(inverses, scores, queries, keys_in, keys, sums, totals)

    def _solved(
        self, inverses: Tensor, scores: Tensor, queries: Tensor, keys_in: Tensor, keys: Tensor, *more: Tensor
    ) -> Made:
        """inverses: L, which becomes A."""
        v, stream = self.v, self.stream
        (T, HV, V), K = v.shape, keys_in.shape[2]
        grid = stream.places, HV
        solve_kernels().invert[grid](
            inverses, stream.start, stream.end, HV, C=CHUNK, DOUBLE=v.dtype == torch.float32, num_warps=1, num_stages=1
        )
        erasing, writing = v.new_empty(T, HV, K), v.new_empty(T, HV, V)
        solve_kernels().spread[grid](
            inverses, keys_in, v, self.beta, given(self.g, v), erasing, writing, stream.start, stream.end,
            *strides(keys_in), *strides(v), HV, K, V, G=self.groups if self.decay < 2 else 1, C=CHUNK,
            BK=self.tile(K, 64), BV=self.tile(V, 64), DECAY=self.decay, PRECISION=precision(v), num_warps=SPREAD_WARPS,
            num_stages=_stages(v),
        )  # fmt: skip
        return Made(inverses, scores, queries, keys, erasing, writing, *more)

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
        HV, V = self.v.shape[1:]
        K, stream, any_ = self.q.shape[2], self.stream, self.q
        summary = y is None and writes is None
        BK, BV = self.tiles()
        columns = -(-V // BV) + (-(-K // BV) if transitions is not None else 0)
        keys = made.queries, made.keys, made.erasing
        inputs = (
            given(self.g, any_), given(made.totals, any_), made.scores, given(entered, any_), given(enter, any_),
            given(leave, any_),
        )  # fmt: skip
        where = *stream.tensors, stream.segments, self.scale, *strides(made.queries), *strides(made.keys)
        chosen: dict[str, Any] = {
            "G": self.groups if self.decay < 2 else 1, "GROUP": stream.group, "C": CHUNK, "BK": BK, "BV": BV,
            "DECAY": self.decay, "HAS_ENTERED": entered is not None and not summary,
            "HAS_ENTER": enter is not None, "WANT_LEAVE": leave is not None, "SUMMARY": summary,
            "PRECISION": precision(self.q), "num_warps": WALK_WARPS if BK >= 128 else 4,
            "num_stages": min(WALK_STAGES, _stages(self.q)) if _room() >= 220_000 and K <= 128 else 1,
        }  # fmt: skip
        grid = columns, HV, stream.stretches
        if dy is None:
            walk_kernels().onward[grid](
                *keys, made.writing, *inputs, given(y, any_), given(writes, any_), given(inner, any_),
                given(transitions, any_), *where, HV, K, V, **chosen, WANT_Y=y is not None,
                WANT_WRITES=writes is not None,
            )  # fmt: skip
        else:
            walk_kernels().back[grid](
                *keys, dy, *inputs, given(writes, any_), given(inner, any_), *where, *strides(dy), HV, K, V, **chosen
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
            num_stages=JOIN_STAGES if K <= 128 and _room() >= 180_000 else 1,
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
        narrow = q.dtype != torch.float32
        gradient_kernels().pair_gradients[M, HV](
            k, v, self.beta, given(self.g, q), made.inverses, made.scores, dy, writes, dwrites, rights, dscores,
            dlower, dv, dbeta, given(dc, q), stream.start, stream.end, self.scale, *strides(k), *strides(v),
            *strides(dy), HV, K, V,
            G=self.groups, C=CHUNK, BK=self.tile(K, 64 if narrow else 32), BV=self.tile(V, 64 if narrow else 32),
            DECAY=self.decay, PRECISION=precision(q), num_warps=PAIR_WARPS, num_stages=_stages(q),
        )  # fmt: skip
        dtype = q.dtype if H == HV else torch.float32
        dq, dk = (torch.empty(T, HV, K, dtype=dtype, device=q.device) for _ in range(2))
        BK, BV = tile(K, 32 if narrow else 16), self.tile(V, 64 if narrow else 32)
        if narrow and self.decay < 2:
            BK = self.tile(K, GRADIENT_COLUMNS)
        tiles = -(-K // BK)
        more = dbeta.new_empty(tiles, T, HV)
        shared = (
            stream.start, stream.end, self.scale, *strides(q), *strides(k), *strides(dy), HV, K, V, T,
        )  # fmt: skip
        chosen: dict[str, Any] = {
            "G": self.groups, "C": CHUNK, "BK": BK, "BV": BV, "PRECISION": precision(q), "num_warps": GRADIENT_WARPS,
        }  # fmt: skip
        dg = None
        if self.decay == 2:
            assert made.sums is not None
            dg = torch.empty_like(made.sums)
            gradient_kernels().channel_gradients[tiles, M, HV](
                q, k, self.beta, made.sums, dscores, dlower, dy, writes, rights, states, dstates, dq, dk, dg, more,
                *shared, **chosen | {"num_warps": CHANNEL_WARPS}, OPERAND=operand(q), num_stages=1,
            )  # fmt: skip
        else:
            read, late, left = None, None, None
            if self.decay == 1:
                read, late, left = torch.empty_like(more), torch.empty_like(more), more.new_empty(tiles, M, HV)
            gradient_kernels().gradients[tiles, M, HV](
                q, k, self.beta, given(self.g, q), dscores, dlower, dy, writes, rights, states, dstates, dq, dk, more,
                given(read, q), given(late, q), given(left, q), *shared, M, DECAY=self.decay, **chosen,
                num_stages=_stages(q),
            )  # fmt: skip
            if self.decay == 1:
                dg = torch.empty_like(dbeta)
                gradient_kernels().decay_gradients[M, HV](
                    dc, read, late, left, dg, stream.start, stream.end, tiles, HV, T, M, C=CHUNK, num_warps=1
                )
        if H != HV:
            dq, dk = (x.unflatten(1, (H, -1)).sum(2).to(q.dtype) for x in (dq, dk))
        return dq, dk, dv, dbeta + more.sum(0), dg


def _stages(x: Tensor) -> int:
    """Loads ahead: tiles of float32 leave no room for them."""
    return 1 if x.dtype == torch.float32 else 2


@functools.cache
def _room() -> int:
    """Bytes of shared memory that a program may take."""
    triton: Any = importlib.import_module("triton")
    if triton.knobs.runtime.interpret:
        return 0
    driver = triton.runtime.driver.active
    return driver.utils.get_device_properties(driver.get_current_device())["max_shared_mem"]


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
    S = stretches_of(start.shape[0])
    states = q.new_empty((S, HV, K, V) if S > 1 else (0,), dtype=torch.float32)
    transitions = q.new_empty((S, HV, K, K) if S > 1 else (0,), dtype=torch.float32)
    return q.new_empty(T, HV, V), final, states, transitions


@delta_rule_backward.register_fake
def _(q, k, v, beta, g, initial, states, transitions, do, dfinal, start, end, segment, first, scale):
    dq, dk, dv, dbeta = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, beta))
    dg = q.new_empty((0,) if g is None else g.shape, dtype=torch.float32)
    return dq, dk, dv, dbeta, dg, q.new_empty((0,) if initial is None else initial.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale, ctx.want_final = inputs
    _, _, states, transitions = output
    ctx.mark_non_differentiable(states, transitions)
    ctx.save_for_backward(*tensors, states, transitions)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    q, k, v, beta, g, initial, *stream, states, transitions = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do.to(v.dtype)
    dfinal = None if dfinal is None or not ctx.want_final else dfinal.float()
    dq, dk, dv, dbeta, dg, dinitial = delta_rule_backward(
        q, k, v, beta, g, initial, states, transitions, do, dfinal, *stream, ctx.scale
    )
    return dq, dk, dv, dbeta, None if g is None else dg, None if initial is None else dinitial, *(None,) * 6


delta_rule.register_autograd(_backward, setup_context=_save)
