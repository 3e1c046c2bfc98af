"""State space duality as walks over heads that share B and C, and gradients of chunks over the heads of a group.

Two operators of torch.library, forward and backward, so that torch.compile takes them into its graphs. One state every
16 or 32 chunks of 64 tokens is kept for the backward pass, nothing else beside the inputs; that makes the states of all
chunks again, and the gradients of states, [M, H, K, V] each in the type of the inputs. Matrix products take that type,
float32 without TF32, and add up in float32. What an operator has not got is an empty tensor.

Legend: T tokens, H heads, G groups of heads, K state dim, V head dim, N segments, M places for chunks, S stretches.
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
    contiguous,
    given,
    left_states,
    or_nothing,
    precision,
    product_tile,
    room,
    rows_ready,
    stretches_of,
    strides,
    tile,
)
from torchlinearmoe.kernels.linear.walk import walk_kernels as linear_kernels

WARPS = {"advance": 4, "walk": 4, "gradients": 8, "finish": 8}
STAGES = {"advance": 3, "walk": 3, "gradients": 3, "finish": 1}
"""Of two-byte numbers: tiles of float32 leave no room for loads ahead, and want twice the warps."""
PROGRAMS = 528
"""Four for each multiprocessor: where `gradients` has fewer chunks, the heads of a group go in parts."""
MOST_BYTES = 2**30
"""Of the states of chunks, and of their gradients, at a time: the backward pass takes the stream in slabs."""


@dataclass(frozen=True)
class _Walk:
    """What the walks of one call and direction share."""

    stream: Stream
    groups: int
    measured: Tensor
    """[M, H, 2, 64] and `totals` [M, H]: of the kernel `measure`."""
    totals: Tensor
    enter: Tensor | None
    """[N, H, K, V]: the state that enters a segment from the side where the walk begins."""
    reverse: bool = False

    def stretches(self, w: Tensor, u: Tensor) -> Tensor | None:
        """The states [S, H, K, V] that enter the stretches; None of a single stretch, which enters empty.

        w: [T, G, K]; u: [T, H, V].
        """
        (_, H, V), K, S = u.shape, w.shape[2], self.stream.stretches
        if S == 1:
            return None
        states, factors = (u.new_empty(shape, dtype=torch.float32) for shape in ((S, H, K, V), (S, H)))
        self._advance(w, u, None, states, factors, range(S))
        BK, BV = tile(K, 16), tile(V, 64)
        linear_kernels().join[-(-K // BK) * -(-V // BV), H](
            states, factors, given(None, states), given(None, states), S, H, K, V, BX=BK, BU=BV, REVERSE=self.reverse,
            ROWS=False, HAS_ENTER=False, WANT_LEAVE=False, num_warps=4,
        )  # fmt: skip
        return states

    def chunks(self, w: Tensor, u: Tensor, entered: Tensor | None, states: Tensor, slab: range) -> None:
        """Write the states that enter the chunks of some stretches, [chunks, H, K, V]; entered: of `stretches`."""
        self._advance(w, u, entered, states, None, slab)

    def _advance(
        self, w: Tensor, u: Tensor, entered: Tensor | None, states: Tensor, factors: Tensor | None, slab: range
    ) -> None:
        stream, (_, H, V), K = self.stream, u.shape, w.shape[2]
        BK, BV, even = tiles(K, V, w)
        dual_kernels().advance[-(-V // BV), H, len(slab)](
            w, u, self.measured, self.totals, given(entered, u), given(self.enter, u), states, given(factors, u),
            *stream.tensors, stream.segments, *strides(w), *strides(u), H, K, V, H // self.groups, slab.start,
            GROUP=stream.group, L=CHUNK, BK=BK, BV=BV, REVERSE=self.reverse, EVERY=factors is None,
            HAS_ENTERED=entered is not None, HAS_ENTER=self.enter is not None, EVEN=even, PRECISION=precision(u),
            **launch("advance", u),
        )  # fmt: skip

    def outputs(
        self,
        x: Tensor,
        w: Tensor,
        u: Tensor,
        entered: Tensor | None,
        y: Tensor,
        leave: Tensor | None,
        states: Tensor | None,
        slab: range,
    ) -> None:
        """Write y [T, H, V] of the tokens of some stretches; in reverse also the states that enter their chunks.

        x, w: [T, G, K]; u: [T, H, V]; leave: [N, H, K, V] gets the states at the other side of the segments that have
        tokens.
        """
        stream, (_, H, V), K = self.stream, u.shape, w.shape[2]
        BK, BV, even = tiles(K, V, x)
        assert K <= BK, "wider states go in parts"
        assert (states is not None) == self.reverse
        dual_kernels().walk[-(-V // BV), H, len(slab)](
            x, w, u, self.measured, self.totals, given(entered, x), given(self.enter, x), given(leave, x), y,
            given(states, x), *stream.tensors, stream.segments, *strides(x), *strides(w), *strides(u), H, K, V,
            H // self.groups, slab.start, GROUP=stream.group, L=CHUNK, BK=BK, BV=BV, REVERSE=self.reverse,
            HAS_ENTERED=entered is not None, HAS_ENTER=self.enter is not None, WANT_LEAVE=leave is not None,
            EVEN=even, PRECISION=precision(x), **launch("walk", x),
        )  # fmt: skip


@torch.library.custom_op("torchlinearmoe::ssd", mutates_args=())
def dual(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor | None,
    start: Tensor,
    end: Tensor,
    segment: Tensor,
    first: Tensor,
    want_final: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [T, H, V], the final states [N, H, K, V], empty where they are not wanted, and what enters [S, H, K, V].

    x: [T, H, V] and B, C: [T, G, K] of one type, K at most 128; dt: [T, H], A: [H] and initial: [N, H, K, V] in fp32;
    start, end, segment: [M], first: [N + 1], a `ChunkTable`.
    """
    x, B, C = rows_ready(x), rows_ready(B), rows_ready(C)
    stream = Stream(start, end, segment, first)
    walk = _Walk(stream, B.shape[1], *_measured(dt, A, stream), contiguous(initial))
    entered = walk.stretches(B, x)
    final = left_states(walk.enter, (stream.segments, x.shape[1], B.shape[2], x.shape[2]), x) if want_final else None
    y = x.new_empty(x.shape)
    walk.outputs(C, B, x, entered, y, final, None, range(stream.stretches))
    return y, or_nothing(final, x), or_nothing(entered, x)


@torch.library.custom_op("torchlinearmoe::ssd_backward", mutates_args=())
def dual_backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor | None,
    entered: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
    start: Tensor,
    end: Tensor,
    segment: Tensor,
    first: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, dt, A, B, C and initial (empty without one)."""
    A, x, B, C, dy = A.contiguous(), rows_ready(x), rows_ready(B), rows_ready(C), rows_ready(dy)
    stream, G = Stream(start, end, segment, first), B.shape[1]
    measured, totals = _measured(dt, A, stream)
    onward = _Walk(stream, G, measured, totals, contiguous(initial))
    back = _Walk(stream, G, measured, totals, contiguous(dfinal), reverse=True)
    dinitial = None if initial is None else left_states(back.enter, tuple(initial.shape), x)
    entering, leaving = entered if entered.numel() else None, back.stretches(C, dy)
    (T, H, V), K, M, S = x.shape, B.shape[2], stream.places, stream.stretches
    slab = min(S, max(1, MOST_BYTES // (stream.group * H * K * V * x.element_size())))
    states, dstates = (x.new_empty(slab * stream.group, H, K, V) for _ in range(2))
    dx, parts = x.new_empty(x.shape), parts_of(H // G, min(slab * stream.group, M) * G)
    sums = _Sums(
        measured.new_empty(M, H, 4, CHUNK),
        *(measured.new_empty(parts, T, G, width) for width in (K, K, CHUNK)),
    )
    for s in range(0, S, slab):
        stretches = range(s, min(S, s + slab))
        back.outputs(B, C, dy, leaving, dx, dinitial, dstates, stretches)
        onward.chunks(B, x, entering, states, stretches)
        _sum_up(sums, x, dy, B, C, onward, states, dstates, stretches)
    dB, dC = B.new_empty(T, G, K), C.new_empty(T, G, K)
    BK, _, even = tiles(K, V, x)
    dual_kernels().finish[M, G](
        B, C, sums.dB, sums.dC, sums.dpairs, dB, dC, start, end, parts, *strides(B), *strides(C), G, K, T,
        L=CHUNK, BK=BK, EVEN=even, PRECISION=precision(x), **launch("finish", x),
    )  # fmt: skip
    ddt, dA, BH = measured.new_empty(T, H), measured.new_zeros(M, H), heads_of(H)
    dual_kernels().steps[M, -(-H // BH)](
        A, measured, sums.heads, ddt, dA, start, end, first, stream.segments, H, L=CHUNK, BH=BH, num_warps=4
    )
    return dx, ddt, dA.sum(0), dB, dC, or_nothing(dinitial, x)


@dataclass(frozen=True)
class _Sums:
    """What the kernel `gradients` writes."""

    heads: Tensor
    """[M, H, 4, 64]: of heads by token."""
    dB: Tensor
    """[parts, T, G, K] and `dC`: what comes of the states, sums over the heads of a part of a group."""
    dC: Tensor
    dpairs: Tensor
    """[parts, T, G, 64]: of the products of C and B inside a chunk."""


def _sum_up(
    sums: _Sums,
    x: Tensor,
    dy: Tensor,
    B: Tensor,
    C: Tensor,
    walk: _Walk,
    states: Tensor,
    dstates: Tensor,
    slab: range,
) -> None:
    """The sums of some stretches; states, dstates: [chunks, H, K, V], what enters their chunks from either side."""
    stream, (T, H, V), (_, G, K), parts = walk.stream, x.shape, B.shape, sums.dB.shape[0]
    BK, BV, even = tiles(K, V, x)
    since = slab.start * stream.group
    chunks = min(stream.places, slab.stop * stream.group) - since
    dual_kernels().gradients[chunks, G, parts](
        x, dy, B, C, walk.measured, walk.totals, states, dstates, sums.heads, sums.dB, sums.dC, sums.dpairs,
        stream.start, stream.end, stream.first, stream.segments, *strides(x), *strides(dy), *strides(B), *strides(C),
        H, G, K, V, H // G, H // G // parts, T, since, L=CHUNK, BK=BK, BV=BV, TILES=-(-V // BV),
        EVEN=even, PRECISION=precision(x), **launch("gradients", x),
    )  # fmt: skip


def tiles(K: int, V: int, x: Tensor) -> tuple[int, int, bool]:
    """Rows and columns of a state that kernels take at once, as many columns as a chunk has tokens, and whether whole
    tiles make the state."""
    BK, BV = product_tile(K, 128, x), CHUNK
    return BK, BV, K % BK == V % BV == 0


def heads_of(H: int) -> int:
    """Heads that kernels of decays take at once."""
    return min(16, 1 << (H - 1).bit_length())


def parts_of(heads: int, programs: int) -> int:
    """Parts, all of as many heads, that fill the chip with so many programs for each."""
    return next(n for n in range(1, heads + 1) if heads % n == 0 and (n * programs >= PROGRAMS or n == heads))


def _measured(dt: Tensor, A: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
    """What walks read of the log decays dt A."""
    H = dt.shape[1]
    measured, totals = (A.new_empty(stream.places, H, *last) for last in ((2, CHUNK), ()))
    BH = heads_of(H)
    dual_kernels().measure[stream.places, -(-H // BH)](
        dt, A.contiguous(), measured, totals, stream.start, stream.end, *strides(dt), H, L=CHUNK, BH=BH, num_warps=4
    )  # fmt: skip
    return measured, totals


def launch(kernel: str, x: Tensor) -> dict[str, int]:
    """How a kernel is launched for products of x's type."""
    wide = x.element_size() > 2
    stages = 1 if wide else STAGES[kernel] if room() >= 160_000 else min(2, STAGES[kernel])
    return {"num_warps": WARPS[kernel] * (2 if wide else 1), "num_stages": stages}


@functools.cache
def dual_kernels() -> Any:  # Triton turns numbers into its own constants
    """The module of kernels."""
    return importlib.import_module("torchlinearmoe.kernels.ssd.dual_kernels")


@dual.register_fake
def _(x, dt, A, B, C, initial, start, end, segment, first, want_final):
    (T, H, V), K, places = x.shape, B.shape[2], start.shape[0]
    final = x.new_empty((first.shape[0] - 1, H, K, V) if want_final else (0,), dtype=torch.float32)
    S = stretches_of(places)
    entered = x.new_empty((S, H, K, V) if S > 1 else (0,), dtype=torch.float32)
    return x.new_empty(T, H, V), final, entered


@dual_backward.register_fake
def _(x, dt, A, B, C, initial, entered, dy, dfinal, start, end, segment, first):
    dx, dB, dC = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in (x, B, C))
    ddt, dA = dt.new_empty(dt.shape), A.new_empty(A.shape)
    return dx, ddt, dA, dB, dC, x.new_empty((0,) if initial is None else initial.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.want_final = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    x, dt, A, B, C, initial, *stream, entered = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy.to(x.dtype)
    dfinal = None if dfinal is None or not ctx.want_final else dfinal.float()
    *gradients, dinitial = dual_backward(x, dt, A, B, C, initial, entered, dy, dfinal, *stream)
    return *gradients, None if initial is None else dinitial, *(None,) * 5


dual.register_autograd(_backward, setup_context=_save)
