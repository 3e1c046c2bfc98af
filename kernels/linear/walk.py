"""The walks of `walk_kernels` as calls on tensors.

Legend: T tokens, H heads, N segments, M places for chunks, S stretches of chunks, K/V key/value head dim.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunk_table import CHUNK, ChunkTable

INSIDE = {"nothing": 0, "pairs": 1, "scores": 2, "kept": 3}
"""Of the kernel."""


@dataclass(frozen=True)
class Stream:
    """A `ChunkTable` as tensors of an operator."""

    start: Tensor
    end: Tensor
    segment: Tensor
    first: Tensor
    longest: int = 32
    """Chunks of a stretch at most."""

    @classmethod
    def of(cls, table: ChunkTable, longest: int = 32) -> Stream:
        """Of a table."""
        return cls(table.start_M, table.end_M, table.segment_M, table.first_N1, longest)

    @property
    def places(self) -> int:
        """M."""
        return self.start.shape[0]

    @property
    def segments(self) -> int:
        """N."""
        return self.first.shape[0] - 1

    @property
    def stretches(self) -> int:
        """S."""
        return stretches_of(self.places, self.longest)

    @property
    def group(self) -> int:
        """Chunks of a stretch."""
        return group_of(self.places, self.longest)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As kernels take them."""
        return self.start, self.end, self.segment, self.first


def group_of(places: int, longest: int = 32) -> int:
    """Chunks of a stretch, steps that wait for each other, where there are so many: enough stretches for every
    multiprocessor, and few states that are stored."""
    return longest if places > 1024 else 16


def stretches_of(places: int, longest: int = 32) -> int:
    """Stretches of so many places for chunks."""
    group = group_of(places, longest)
    return (places + group - 1) // group


@dataclass(frozen=True)
class Summaries:
    """What leaves each stretch: `states` [S, H, X, U], and `factors` [S, H, 1 or X] of what enters it."""

    states: Tensor
    factors: Tensor
    reverse: bool

    def join(self, states: Tensor, enter: Tensor | None = None, leave: Tensor | None = None) -> None:
        """Make of `states`, a copy of these perhaps, what enters each stretch.

        enter, leave: [H, X, U] in fp32, what enters the first stretch of the walk, and is filled with what leaves the
        last.
        """
        S, H, X, U = states.shape
        BX, BU = tile(X, 16), tile(U, 64)
        walk_kernels().join[-(-X // BX) * -(-U // BU), H](
            states, self.factors, given(enter, states), given(leave, states), S, H, X, U, BX=BX, BU=BU,
            REVERSE=self.reverse, ROWS=self.factors.shape[2] > 1, HAS_ENTER=enter is not None,
            WANT_LEAVE=leave is not None, num_warps=4,
        )  # fmt: skip

    def joined(self, enter: Tensor | None) -> Tensor:
        """What enters each stretch, and after them what leaves the last: [S + 1, H, X, U]."""
        S = len(self.states)
        states = self.states.new_empty(S + 1, *self.states.shape[1:])
        states[:S] = self.states
        self.join(states[:S], contiguous(enter), states[S])
        return states

    def passed(self) -> Tensor:
        """The factor over all of them, [H, 1 or X]."""
        return self.factors.prod(0)


@dataclass(frozen=True)
class Walk:
    """What the walks of one call share."""

    stream: Stream
    scale: float
    reverse: bool = False
    decay: int = 0
    """0 none, 1 per token and head, 2 per row of the state, 3 per column."""
    decays: Tensor | None = None
    """[6, H, T], what `measured` makes of a decay per head."""
    totals: Tensor | None = None
    """[3, M, H] of the same, or factors over chunks, [M, H, rows or columns]."""
    enter: Tensor | None = None
    """[N, H, K, V]: the state that enters a segment from the side where the walk begins."""

    def states(self, w: Tensor, u: Tensor) -> Tensor | None:
        """The states [S, H, X, U] that enter the stretches; None of a single stretch, which enters empty.

        w: [T, H, X]; u: [T, H, U].
        """
        if self.stream.stretches == 1:
            return None
        summaries = self.summaries(w, u)
        summaries.join(summaries.states)
        return summaries.states

    def summaries(self, w: Tensor, u: Tensor) -> Summaries:
        """What each stretch makes of what enters it."""
        stream, (_, H, X), U = self.stream, w.shape, u.shape[2]
        S = stream.stretches
        assert self.decay != 3
        states = w.new_empty(S, H, X, U, dtype=torch.float32)
        factors = w.new_empty(S, H, X if self.decay == 2 else 1, dtype=torch.float32)
        BX, BU = product_tile(X, 128, w), product_tile(U, 64, w)
        grid = -(-X // BX) * -(-U // BU), H, S
        walk_kernels().summarize[grid](
            w, u, given(self.decays, w), given(self.totals, w), given(self.enter, w), states, factors,
            *stream.tensors, stream.segments, self.scale, *strides(w), *strides(u), H, X, U, w.shape[0], stream.places,
            GROUP=stream.group, C=CHUNK, BX=BX, BU=BU, REVERSE=self.reverse, DECAY=self.decay,
            HAS_ENTER=self.enter is not None, SCALED=self.scale != 1.0, PRECISION=precision(w), num_warps=4,
            num_stages=_stages(w),
        )  # fmt: skip
        return Summaries(states, factors, self.reverse)

    def outputs(
        self,
        x: Tensor,
        w: Tensor,
        u: Tensor,
        entered: Tensor | None,
        *,
        transposed: bool = False,
        inside: Literal["pairs", "scores", "nothing", "kept"] = "pairs",
        scores: Tensor | None = None,
        leave: Tensor | None = None,
        sums_with: Tensor | None = None,
        sums: Literal["tokens", "chunks"] = "tokens",
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """y [T, H, U], and the sums of y times `sums_with` [T, H, U]: by token, [tiles, T, H], or chunk, [M, H, U].

        x, w: [T, H, X]; u: [T, H, U]; entered: of `states`; transposed: states are [.., U, X]; inside: what tokens
        of a chunk read of each other, by the products of x and w, by scores [T, H, C], not at all, or not at all but
        with scores set to the products; leave: [N, H, X, U] gets the states at the other side of the segments that have
        tokens; dtype: of y, u's by default.
        """
        stream, (T, H, X), U = self.stream, x.shape, u.shape[2]
        BX, BU = product_tile(X, 128, x), product_tile(U, 64, x)
        assert X <= BX, "wider states go in parts"
        assert self.decay != 1 or inside == "pairs", "the factors of plain chunks go with pairs"
        grid = -(-U // BU), H, stream.stretches
        y = torch.empty(T, H, U, dtype=dtype or u.dtype, device=u.device)
        total, mode = None, 0
        if sums_with is not None:
            mode = 1 if sums == "tokens" else 2
            shape = (grid[0], T, H) if mode == 1 else (stream.places, H, U)
            total = y.new_empty(shape, dtype=torch.float32)
        z = u if sums_with is None else sums_with
        for plain in (True, False) if self.decay == 1 else (True,):
            walk_kernels().walk[grid](
                x, w, u, given(self.decays, x), given(self.totals, x), given(scores, x), given(entered, x),
                given(self.enter, x), given(leave, x), y, z, given(total, x),
                *stream.tensors, stream.segments, self.scale, *strides(x), *strides(w), *strides(u), *strides(z),
                H, X, U, T, stream.places, GROUP=stream.group, C=CHUNK, BX=BX, BU=BU, REVERSE=self.reverse,
                DECAY=self.decay, PLAIN=plain, INSIDE=INSIDE[inside], TRANSPOSED=transposed,
                HAS_ENTERED=entered is not None, HAS_ENTER=self.enter is not None, WANT_LEAVE=leave is not None,
                SUMS=mode, SCALED=self.scale != 1.0, PRECISION=precision(x), num_warps=4, num_stages=_stages(x),
            )  # fmt: skip
        return y, total


def measured(g: Tensor, stream: Stream, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What walks read of log decays g [T, H]: `Walk.decays` and `Walk.totals`; dtype: of what is multiplied."""
    least = -8.0 if dtype == torch.float16 else -80.0  # half of it is an exponent
    T, H = g.shape
    decays, totals = g.new_empty(6, H, T), g.new_empty(3, stream.places, H)
    walk_kernels().measure[stream.places, H](
        g.contiguous(), decays, totals, stream.start, stream.end, H, T, stream.places, C=CHUNK, LEAST=least, num_warps=1
    )
    return decays, totals


def left_states(enter: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """What the states that leave are written to: a segment without tokens passes on what enters."""
    if enter is not None:
        return enter.clone(memory_format=torch.contiguous_format)
    return like.new_zeros(shape, dtype=torch.float32)


def rows_ready(x: Tensor) -> Tensor:
    """x with channels that lie side by side; tokens and heads may lie anyhow."""
    return x if x.stride(-1) == 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    """x, contiguous."""
    return None if x is None else x.contiguous()


def strides(x: Tensor) -> tuple[int, int]:
    """Of tokens and heads."""
    return x.stride(0), x.stride(1)


def given(x: Tensor | None, other: Tensor) -> Tensor:
    """A kernel's pointer; one that it does not use where there is none."""
    return other if x is None else x


def or_nothing(x: Tensor | None, like: Tensor) -> Tensor:
    """x, or an empty tensor: what an operator returns where it has nothing."""
    return like.new_empty(0, dtype=torch.float32) if x is None else x


def tile(width: int, most: int) -> int:
    """A power of two that holds `width`, from 16 to `most`."""
    return max(16, min(most, 1 << (width - 1).bit_length()))


def product_tile(width: int, most: int, x: Tensor) -> int:
    """The same for tiles of x's type that products take: never fewer than 128 bytes, 64 of two-byte numbers.

    Narrower ones lie otherwise in shared memory, and the ptxas that Triton 3.6 brings (CUDA 12.8) then loses the
    descriptors of a second one at the same place: it reads registers that nothing has written. See
    `tests/kernels/unwritten.py`.
    """
    return max(tile(width, most), 128 // x.element_size())


def precision(x: Tensor) -> str:
    """Of products of float32 in a call of x's type: three of TF32 are as good as float32, and fit into registers."""
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def _stages(x: Tensor) -> int:
    """Loads ahead: tiles of float32 leave no room for them."""
    return 1 if x.dtype == torch.float32 else 3


@functools.cache
def room() -> int:
    """Bytes of shared memory that a program may take; 0 where Triton is interpreted."""
    triton: Any = importlib.import_module("triton")
    if triton.knobs.runtime.interpret:
        return 0
    driver = triton.runtime.driver.active
    return driver.utils.get_device_properties(driver.get_current_device())["max_shared_mem"]


@functools.cache
def walk_kernels() -> Any:  # Triton turns numbers into its own constants
    """The module of kernels."""
    return importlib.import_module("torchlinearmoe.kernels.linear.walk_kernels")
