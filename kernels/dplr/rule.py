"""DPLR by our Triton kernels: chunks of 64 tokens in WY form, walked many stretches at once.

Forward. With E the state that enters a chunk, C its last token, c_t the sum of its log decays up to and including t, c'
the sum before t, and

    q_in = scale q e^c    a_in = a e^{c'}    k_out = k e^{c_C - c}    b_out = b e^{c_C - c}

    x  = ab x + ak v + a_in E                       what tokens read along a: x = A (ak v + a_in E), A = (I - ab)^-1
    o  = q_in E + qk v + qb x                       E' = e^{c_C} E + b_out^T x + k_out^T v

qb, qk, ab, ak: scores, decayed, of a chunk's earlier tokens (`chunk_kernels`). A knows nothing of states, so it is made
for all chunks at once, and A ak and A a_in with it; the walk then has x = (A ak) v + (A a_in) E. States that enter
chunks are written, as products read them, and o is made of them, again for all chunks at once.

Backward. x solves its system exactly, so with R the gradient of the state that leaves a chunk and r that of x's right
side,

    r  = A^T (qb^T do + b_out R)                    R' = e^{c_C} R + a_in^T r + q_in^T do

which is the same walk from the last chunk to the first, with A^T qb^T, A^T b_out, a_in, q_in and do where it had A ak,
A a_in, b_out, k_out and v. E and x are walked again. Then everything is a product of {do, r} and {x, v}, E or R:

    dqb, dqk, dab, dak = do x^T, do v^T, r x^T, r v^T                  dv = qk^T do + ak^T r + k_out R
    dq_in, da_in, db_out, dk_out = do E^T, r E^T, x R^T, v R^T
    dg_j = sum over t >= j of q_t dq_t - k_t dk_t - b_t db_t in the chunk, over t > j of a_t da_t
           + sum over t of k_out dk_out + b_out db_out + e^{c_C} times the sum over V of E R

Budget a token and head, K = V = D, C = 64, multiply-adds: 4 C D of scores and C D + C^2 and the inverse of what they
solve, 3 D^2 + C D of a walk, D^2 + 2 C D of o: 4 D^2 + 8 C D, and 4 D^2 + C D more where stretches are summarised;
backward about three times that. Bytes of 16 bits, forward: 5 D of inputs and 4 D of decays read, 9 D of what the walks
take written and read, twice 2 D^2 / C of states, 2 D of x and o. Kept for the backward pass: the inputs, the sums c in
place of the decays, and for each stretch of 16 or 32 chunks a state and a transition. Temporary, backward: 8 D + 6 C
and 4 D^2 / C a token in 16 bits.

Products take the type of the inputs, what is scaled up and down float32 where that is float16, and add up in float32;
the inverse is float32, as are states. Nothing is tuned at run time, sums have one order: the same bits on every run.

Two operators of torch.library, forward and backward, so that torch.compile takes them into its graphs. What an operator
has not got is an empty tensor.

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

STEEPEST = 20.0
"""A log decay below minus this counts as that: `linear/channel_kernels.py`."""
LEAST = 64
"""Rows and columns of tiles of 16 bits that products of warp groups take: see `product_tile` of linear/walk.py."""
WALK_WARPS = 4
"""Of 16 bits: eight would have each product of 64 tokens made twice."""
PAIR_WARPS = 8
"""Of scores."""
MERGE_WARPS = 4
GRADIENT_WARPS, GRADIENT_COLUMNS = 8, 32
GRADIENT_REGISTERS = 128
"""Of a thread: so that a multiprocessor holds two programs, one of which computes while the other waits."""
MOST_LEVELS = 3
"""Halvings that leave blocks of 8 tokens."""


def levels_of(lower_bound: float | None) -> int:
    """How often a chunk is halved until no exponential relative to the middle of a block leaves e^40; with decays
    beyond all bounds, e^80."""
    steepest = STEEPEST if lower_bound is None else min(STEEPEST, -lower_bound)
    return next((n for n in range(MOST_LEVELS) if steepest * (CHUNK >> n) / 2 <= 40.0), MOST_LEVELS)


@torch.library.custom_op("torchlinearmoe::dplr", mutates_args=())
def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    initial: Tensor | None,
    start: Tensor,
    end: Tensor,
    segment: Tensor,
    first: Tensor,
    scale: float,
    levels: int,
    want_final: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o [T, H, V], the final states [N, H, K, V], empty where they are not wanted, what enters stretches, [S, H, K, V],
    and their transitions, [S, H, K, K], both empty of a single stretch, and the sums c of log decays, [T, H, K].

    q, k, a, b: [T, H, K]; v: [T, H, V] of one type; g: [T, H, K] and initial: [N, H, K, V] in fp32; start, end,
    segment: [M], first: [N + 1], a `ChunkTable`; levels: of `levels_of`.
    """
    q, k, v, a, b = (rows_ready(x) for x in (q, k, v, a, b))
    stream = Stream(start, end, segment, first)
    c = cumulated(g, stream)
    chunks = chunks_of(q, k, a, b, c, stream, scale, levels, back=False)
    onward = chunks.onward(v, contiguous(initial))
    entered, transitions = onward.stretches(None)
    final = left_states(onward.enter, (stream.segments, *q.shape[1:], v.shape[2]), q) if want_final else None
    states, x = onward.walk(entered, final)
    o = output(chunks.q_in, states, chunks.qk, v, chunks.qb, x, stream, transposed=False)
    return o, or_nothing(final, q), or_nothing(entered, q), or_nothing(transitions, q), c


@torch.library.custom_op("torchlinearmoe::dplr_backward", mutates_args=())
def dplr_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    initial: Tensor | None,
    entered: Tensor,
    transitions: Tensor,
    do: Tensor,
    dfinal: Tensor | None,
    start: Tensor,
    end: Tensor,
    segment: Tensor,
    first: Tensor,
    scale: float,
    levels: int,
    want_dg: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, a, b, g (empty where it is not wanted) and initial (empty without one)."""
    q, k, v, a, b, do = (rows_ready(x) for x in (q, k, v, a, b, do))
    stream = Stream(start, end, segment, first)
    chunks = chunks_of(q, k, a, b, c, stream, scale, levels, back=True)
    states, x = chunks.onward(v, contiguous(initial)).walk(entered if entered.numel() else None, None)
    back = chunks.back(do, contiguous(dfinal))
    left, _ = back.stretches(transitions)
    dinitial = None if initial is None else left_states(back.enter, tuple(initial.shape), q)
    dstates, r = back.walk(left, dinitial)
    dq, dk, dv, da, db, dg = gradients(q, k, v, a, b, c, do, chunks, states, x, dstates, r, scale, levels, want_dg)
    return dq, dk, dv, da, db, or_nothing(dg, q), or_nothing(dinitial, q)


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    do: Tensor,
    chunks: Chunks,
    states: Tensor,
    x: Tensor,
    dstates: Tensor,
    r: Tensor,
    scale: float,
    levels: int,
    want_dg: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Of q, k, v, a, b and g, from both walks."""
    stream, (_, H, K), V = chunks.stream, q.shape, v.shape[2]
    dv = output(chunks.k_out, dstates, chunks.qk, do, chunks.ak, r, stream, transposed=True)
    narrow = q.dtype != torch.float32
    pairs = q.new_empty(q.shape[0], H, 2, 2 * CHUNK)
    kernels("gradient").pair_gradients[stream.places, H](
        do, r, v, x, pairs, stream.start, stream.end, *strides(do), *strides(v), H, V, C=CHUNK,
        BV=_rows(V, q, 64 if narrow else 32),
        PRECISION=precision(q), num_warps=GRADIENT_WARPS, num_stages=1,
    )  # fmt: skip
    dq, dk, da, db = (torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (q, k, a, b))
    dg = torch.empty_like(c) if want_dg else None
    B = tile(K, GRADIENT_COLUMNS if narrow else 16)
    kernels("gradient").channel_gradients[-(-K // B), stream.places, H](
        q, k, a, b, c, v, x, do, r, states, dstates, pairs, dq, dk, da, db, given(dg, c),
        stream.start, stream.end, scale, *strides(q), *strides(k), *strides(a), *strides(b), *strides(v), *strides(do),
        H, K, V, C=CHUNK, B=B, BV=_rows(V, q, 128 if narrow else 32), LEVELS=levels, WANT_DG=want_dg,
        OPERAND=operand(q), PRECISION=precision(q), num_warps=GRADIENT_WARPS, num_stages=1,
        maxnreg=GRADIENT_REGISTERS if narrow else None,
    )  # fmt: skip
    return dq, dk, dv, da, db, dg


@dataclass(frozen=True)
class _Walk:
    """`walk` of `walk_kernels` in one direction; all but u and near: [T, H, K]."""

    stream: Stream
    reverse: bool
    near: Tensor
    w: Tensor
    b: Tensor
    k: Tensor
    u: Tensor
    totals: Tensor
    enter: Tensor | None
    """[N, H, K, V]: the state that enters a segment from the side where the walk begins."""

    def stretches(self, transitions: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What enters the stretches and their transitions, made where they are not given; None of a single one."""
        if self.stream.stretches == 1:
            return None, None
        entered, transitions = self.summarized(transitions)
        self.join(entered, transitions, reverse=self.reverse)
        return entered, transitions

    def summarized(self, transitions: Tensor | None) -> tuple[Tensor, Tensor]:
        """What leaves the stretches as if nothing entered, and their transitions."""
        (_, H, K), V, S = self.w.shape, self.u.shape[2], self.stream.stretches
        left = self.w.new_empty(S, H, K, V, dtype=torch.float32)
        columns = self._tiles(V)
        if transitions is None:
            transitions = self.w.new_empty(S, H, K, K, dtype=torch.float32)
            columns += self._tiles(K)
        self._launch(columns, left, transitions, None, None, None)
        return left, transitions

    def join(
        self,
        states: Tensor,
        transitions: Tensor,
        *,
        reverse: bool,
        enter: Tensor | None = None,
        leave: Tensor | None = None,
    ) -> None:
        """Make of what leaves stretches, [S, H, K, any], what enters them.

        enter, leave: [H, K, any], what enters the first stretch of the walk, and is filled with what leaves the last.
        """
        S, H, K, V = states.shape
        BV = tile(V, 16)
        kernels("walk").join[-(-V // BV), H](
            states, transitions, given(enter, states), given(leave, states), S, H, K, V, BK=tile(K, 128), BV=BV,
            REVERSE=reverse, HAS_ENTER=enter is not None, WANT_LEAVE=leave is not None, num_warps=8, num_stages=1,
        )  # fmt: skip

    def walk(self, entered: Tensor | None, leave: Tensor | None) -> tuple[Tensor, Tensor]:
        """The states that enter chunks, [M, H, K, V] in u's type, and z [T, H, V].

        leave: [N, H, K, V] gets the states at the other side of the segments that have tokens.
        """
        (T, H, K), V = self.w.shape, self.u.shape[2]
        states, z = self.w.new_empty(self.stream.places, H, K, V), self.w.new_empty(T, H, V)
        self._launch(self._tiles(V), entered, None, leave, states, z)
        return states, z

    @property
    def _columns(self) -> int:
        """Of a tile: a program has a state of K rows in registers."""
        return LEAST if self.w.dtype != torch.float32 else 16

    def _tiles(self, width: int) -> int:
        return -(-width // self._columns)

    def _launch(
        self,
        columns: int,
        entered: Tensor | None,
        transitions: Tensor | None,
        leave: Tensor | None,
        states: Tensor | None,
        z: Tensor | None,
    ) -> None:
        stream, u, (_, H, K), V = self.stream, self.u, self.w.shape, self.u.shape[2]
        kernels("walk").walk[columns, H, stream.stretches](
            self.near, self.w, self.b, self.k, u, self.totals, given(self.enter, u), given(entered, u),
            given(transitions, u), given(leave, u), given(states, u), given(z, u), *stream.tensors, stream.segments,
            *strides(u), H, K, V, GROUP=stream.group, C=CHUNK, BK=_rows(K, u), BV=self._columns,
            REVERSE=self.reverse, SUMMARY=states is None, HAS_ENTERED=entered is not None,
            HAS_ENTER=self.enter is not None, WANT_LEAVE=leave is not None, PRECISION=precision(u),
            num_warps=8 if u.dtype == torch.float32 else WALK_WARPS, num_stages=1,
        )  # fmt: skip


def _rows(K: int, x: Tensor, most: int = 128) -> int:
    """Rows of a tile of states in products of x's type."""
    return tile(K, most) if x.dtype == torch.float32 else product_tile(K, most, x)


@dataclass(frozen=True)
class Chunks:
    """What `chunk_kernels` make of the inputs, by the names of the module's docstring.

    solved_a = A a_in and solved_ak = A ak; solved_b = A^T b_out and solved_qb = A^T qb^T, with a_in, where gradients
    are wanted.
    """

    stream: Stream
    qb: Tensor
    qk: Tensor
    ak: Tensor
    q_in: Tensor
    k_out: Tensor
    b_out: Tensor
    solved_a: Tensor
    solved_ak: Tensor
    totals: Tensor
    a_in: Tensor | None
    solved_b: Tensor | None
    solved_qb: Tensor | None

    def onward(self, v: Tensor, initial: Tensor | None) -> _Walk:
        """The walk of E and x."""
        return _Walk(self.stream, False, self.solved_ak, self.solved_a, self.b_out, self.k_out, v, self.totals, initial)

    def back(self, do: Tensor, dfinal: Tensor | None) -> _Walk:
        """The walk of R and r."""
        assert self.a_in is not None and self.solved_b is not None and self.solved_qb is not None
        return _Walk(self.stream, True, self.solved_qb, self.solved_b, self.a_in, self.q_in, do, self.totals, dfinal)


def chunks_of(
    q: Tensor, k: Tensor, a: Tensor, b: Tensor, c: Tensor, stream: Stream, scale: float, levels: int, back: bool
) -> Chunks:
    (T, H, K), M = q.shape, stream.places

    def pairs(dtype: torch.dtype = q.dtype) -> Tensor:
        return q.new_empty(T, H, CHUNK, dtype=dtype)

    def rows() -> Tensor:
        return q.new_empty(T, H, K)

    qb, qk, inverse, ak = pairs(), pairs(), pairs(torch.float32), pairs()
    fine = operand(torch.empty(0))  # float32
    for x, with_b, with_k, factor, kind in ((q, qb, qk, scale, operand(q)), (a, inverse, ak, 1.0, fine)):
        kernels("chunk").score[M, H](
            x, b, k, c, with_b, with_k, stream.start, stream.end, factor, *strides(x), *strides(b), *strides(k), H, K,
            C=CHUNK, B=tile(K, 32), LEVELS=levels, BEFORE=x is a, OPERAND=kind, PRECISION=precision(q),
            num_warps=PAIR_WARPS, num_stages=1,
        )  # fmt: skip
    kernels("chunk").invert_blocks[M, H](inverse, stream.start, stream.end, H, C=CHUNK, num_warps=2)
    kernels("chunk").merge_blocks[M, H](
        inverse, stream.start, stream.end, H, C=CHUNK, num_warps=MERGE_WARPS, num_stages=1
    )
    made = Chunks(
        stream, qb, qk, ak, rows(), rows(), rows(), rows(), pairs(), q.new_empty(M, H, K, dtype=torch.float32),
        rows() if back else None, rows() if back else None, pairs() if back else None,
    )  # fmt: skip
    kernels("chunk").spread[M, H](
        q, k, a, b, c, inverse, ak, qb, made.q_in, made.k_out, given(made.a_in, q), made.b_out, made.solved_a,
        made.solved_ak, given(made.solved_b, q), given(made.solved_qb, q), made.totals, stream.start, stream.end, scale,
        *strides(q), *strides(k), *strides(a), *strides(b), H, K, C=CHUNK,
        B=tile(K, 32) if q.dtype == torch.float32 else LEAST, BACK=back,
        PRECISION=precision(q), num_warps=4, num_stages=1,
    )  # fmt: skip
    return made


def output(
    x: Tensor, states: Tensor, near_u: Tensor, u: Tensor, near_z: Tensor, z: Tensor, stream: Stream, transposed: bool
) -> Tensor:
    """x S + near_u u + near_z z, [T, H, V]."""
    (_, H, K), V = x.shape, u.shape[2]
    y, BV = torch.empty_like(z), _rows(V, x, 64)
    kernels("chunk").output[-(-V // BV), stream.places, H](
        x, states, near_u, u, near_z, z, y, stream.start, stream.end, *strides(u), H, K, V, C=CHUNK, B=_rows(K, x, 64),
        BV=BV, TRANSPOSED=transposed, PRECISION=precision(x), num_warps=4, num_stages=1,
    )  # fmt: skip
    return y


@functools.cache
def kernels(name: str) -> Any:  # Triton turns numbers into its own constants
    """A module of kernels of this folder."""
    return importlib.import_module(f"torchlinearmoe.kernels.dplr.{name}_kernels")


@dplr.register_fake
def _(q, k, v, a, b, g, initial, start, end, segment, first, scale, levels, want_final):
    (T, H, K), V, S = q.shape, v.shape[2], stretches_of(start.shape[0])
    final = q.new_empty((first.shape[0] - 1, H, K, V) if want_final else (0,), dtype=torch.float32)
    entered = q.new_empty((S, H, K, V) if S > 1 else (0,), dtype=torch.float32)
    transitions = q.new_empty((S, H, K, K) if S > 1 else (0,), dtype=torch.float32)
    c = torch.empty_like(g, memory_format=torch.contiguous_format)
    return v.new_empty(T, H, V), final, entered, transitions, c


@dplr_backward.register_fake
def _(q, k, v, a, b, c, initial, entered, transitions, do, dfinal, start, end, segment, first, scale, levels, want_dg):
    dq, dk, dv, da, db = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, a, b))
    dg = q.new_empty(c.shape if want_dg else (0,), dtype=torch.float32)
    return dq, dk, dv, da, db, dg, q.new_empty((0,) if initial is None else initial.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, a, b, _, initial, *stream, ctx.scale, ctx.levels, ctx.want_final = inputs
    _, _, entered, transitions, c = output
    ctx.mark_non_differentiable(entered, transitions, c)
    ctx.save_for_backward(q, k, v, a, b, c, initial, entered, transitions, *stream)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    q, k, v, a, b, c, initial, entered, transitions, *stream = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do.to(v.dtype)
    dfinal = None if dfinal is None or not ctx.want_final else dfinal.float()
    want_dg = ctx.needs_input_grad[5]
    *grads, dg, dinitial = dplr_backward(
        q, k, v, a, b, c, initial, entered, transitions, do, dfinal, *stream, ctx.scale, ctx.levels, want_dg
    )
    return *grads, dg if want_dg else None, None if initial is None else dinitial, *(None,) * 7


dplr.register_autograd(_backward, setup_context=_save)
