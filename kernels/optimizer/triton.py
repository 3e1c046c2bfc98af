"""Norms, sums over micro-batches and AdamW over all tensors of a kind, each in one launch.

Everything is bound by memory. Bytes an element, and at 4.2 TB/s ms for 2.48e9 of them:

    sum of squares    2 (bfloat16 gradients), 4 (float32)                        1.2, 2.4
    sum of gradients  4 + 2 + 4, of the first two 2 + 2 + 4                      5.9, 4.7
    AdamW             gradient 2; weight and rest 4 + 4; moments 8 + 8           15.4
                      with bfloat16 moments 4 + 4                                10.6

A gradient may come in two parts, what earlier micro-batches gave and the last one's: norm and update add them as they
read, which costs the bytes of one more read instead of a pass.

bfloat16 is read and written as 16-bit integers, so that the kernels compute in float32 and int32 alone. Sums are made
block by block and added in a fixed order: the same bits on every run. See `definition` for the formulas.
"""
# Constants of the compiler are written as plain values.
# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchlinearmoe.kernels.optimizer.blocks import BLOCK, Blocks
from torchlinearmoe.kernels.optimizer.rounding import HIGH_FACTOR, STEP_FACTOR

TILE = 2048
"""Elements a program works on at a time."""
WARPS = 8
COLUMNS = 9
"""Of the table: addresses of weight, rest and both moments, elements, the three numbers of a `Place`, the key."""

_YES, _NO = tl.constexpr(True), tl.constexpr(False)
_TILE = tl.constexpr(TILE)
_BLOCK = tl.constexpr(BLOCK)
_COLUMNS = tl.constexpr(COLUMNS)
_STEP_FACTOR = tl.constexpr(STEP_FACTOR)
_HIGH_FACTOR = tl.constexpr(HIGH_FACTOR)


@triton.jit
def _load(address, start, i, left, kind: tl.constexpr, FULL: tl.constexpr):
    """Elements start + i of the tensor at `address`, 0 from `left` on.

    Places within a tile are 32 bits wide, which saves registers. Without a mask where all are there: one would keep
    loads from being whole vectors.
    """
    p = tl.multiple_of(address.to(tl.pointer_type(kind)) + start + i, [16])
    if FULL:
        x = tl.load(p)
    else:
        x = tl.load(p, mask=i < left, other=0)
    return x


@triton.jit
def _store(address, start, i, left, x, kind: tl.constexpr, FULL: tl.constexpr):
    p = tl.multiple_of(address.to(tl.pointer_type(kind)) + start + i, [16])
    if FULL:
        tl.store(p, x)
    else:
        tl.store(p, x, mask=i < left)


@triton.jit
def _read(address, start, i, left, HALF: tl.constexpr, FULL: tl.constexpr):
    """float32 of a float32 or, where HALF, a bfloat16 tensor."""
    if HALF:
        x = (_load(address, start, i, left, tl.int16, FULL).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        x = _load(address, start, i, left, tl.float32, FULL)
    return x


@triton.jit
def _write(address, start, i, left, x, bits, HALF: tl.constexpr, FULL: tl.constexpr):
    """Write float32 `x`, as bfloat16 rounded by chance with `bits` where HALF."""
    if HALF:
        whole = x.to(tl.int32, bitcast=True) + bits.to(tl.int32)
        _store(address, start, i, left, (whole >> 16).to(tl.int16), tl.int16, FULL)
    else:
        _store(address, start, i, left, x, tl.float32, FULL)


@triton.jit
def _pcg(x):
    state = x * 747796405 + 2891336453
    word = ((state >> ((state >> 28) + 4)) ^ state) * 277803737
    return (word >> 22) ^ word


@triton.jit
def _read_gradient(grad, earlier, start, i, left, HALF: tl.constexpr, PARTS: tl.constexpr, FULL: tl.constexpr):
    """The gradient; PARTS: 1, or 2 with an earlier part in float32, 3 in bfloat16."""
    g = _read(grad, start, i, left, HALF, FULL)
    if PARTS > 1:
        g += _read(earlier, start, i, left, PARTS == 3, FULL)
    return g


@triton.jit
def _square_sum(grads, earlier, tensor_of, first, size, sums, HALF: tl.constexpr, PARTS: tl.constexpr):
    block = tl.program_id(0)
    n = tl.load(tensor_of + block)
    start = (block - tl.load(first + n)).to(tl.int64) * _BLOCK
    left = tl.minimum(tl.load(size + n) - start, _BLOCK).to(tl.int32)
    grad, before = tl.load(grads + n), tl.load(earlier + n)
    total = tl.zeros((_TILE,), tl.float32)
    for offset in range(0, _BLOCK, _TILE):
        i = offset + tl.arange(0, _TILE)
        if offset + _TILE <= left:
            g = _read_gradient(grad, before, start, i, left, HALF, PARTS, _YES)
        else:
            g = _read_gradient(grad, before, start, i, left, HALF, PARTS, _NO)
        total += g * g
    tl.store(sums + block, tl.sum(total, 0))


@triton.jit
def _add_tile(total, earlier, grad, start, i, left, HALF: tl.constexpr, FULL: tl.constexpr):
    x = _read(earlier, start, i, left, HALF, FULL) + _read(grad, start, i, left, _YES, FULL)
    _store(total, start, i, left, x, tl.float32, FULL)


@triton.jit
def _add(totals, earlier, grads, tensor_of, first, size, HALF: tl.constexpr):
    block = tl.program_id(0)
    n = tl.load(tensor_of + block)
    start = (block - tl.load(first + n)).to(tl.int64) * _BLOCK
    left = tl.minimum(tl.load(size + n) - start, _BLOCK).to(tl.int32)
    total, before, grad = tl.load(totals + n), tl.load(earlier + n), tl.load(grads + n)
    for offset in range(0, _BLOCK, _TILE):
        i = offset + tl.arange(0, _TILE)
        if offset + _TILE <= left:
            _add_tile(total, before, grad, start, i, left, HALF, _YES)
        elif offset < left:
            _add_tile(total, before, grad, start, i, left, HALF, _NO)


@triton.jit
def _adamw_tile(
    row, grad, earlier, start, i, left, seed, keep, size, spread, clip, beta1, beta2, eps,
    SPLIT: tl.constexpr, HALF_GRAD: tl.constexpr, PARTS: tl.constexpr, HALF_STATE: tl.constexpr, PLACES: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    weight, rest, exp_avg, exp_avg_sq = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    g = _read_gradient(grad, earlier, start, i, left, HALF_GRAD, PARTS, FULL) * clip
    m = _read(exp_avg, start, i, left, HALF_STATE, FULL)
    v = _read(exp_avg_sq, start, i, left, HALF_STATE, FULL)
    w = _read(weight, start, i, left, SPLIT, FULL)
    if SPLIT:
        low = _load(rest, start, i, left, tl.int16, FULL).to(tl.int32)
        w = (w.to(tl.int32, bitcast=True) + low).to(tl.float32, bitcast=True)
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    w = w * keep - size * m / (tl.sqrt(v) * spread + eps)
    low_bits, high_bits = i, i
    if HALF_STATE:
        place = tl.load(row + 5) + start + i
        if PLACES:
            inner = tl.load(row + 6)
            if inner > 0:
                place = tl.load(row + 5) + (start + i) // inner * tl.load(row + 7) + (start + i) % inner
        bits = _pcg(seed + place.to(tl.uint32) + (place >> 32).to(tl.uint32) * _HIGH_FACTOR)
        low_bits, high_bits = bits & 0xFFFF, bits >> 16
    _write(exp_avg, start, i, left, m, low_bits, HALF_STATE, FULL)
    _write(exp_avg_sq, start, i, left, v, high_bits, HALF_STATE, FULL)
    if SPLIT:
        bits = w.to(tl.int32, bitcast=True)
        upper = (bits + 0x8000) >> 16
        _store(weight, start, i, left, upper.to(tl.int16), tl.int16, FULL)
        _store(rest, start, i, left, (bits - (upper << 16)).to(tl.int16), tl.int16, FULL)
    else:
        _store(weight, start, i, left, w, tl.float32, FULL)


@triton.jit
def _adamw(
    table, grads, earlier, tensor_of, first, scalars, steps, factor, skipped,
    beta1, beta2, eps,
    SPLIT: tl.constexpr, HALF_GRAD: tl.constexpr, PARTS: tl.constexpr, HALF_STATE: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    if tl.load(skipped) != 0:
        return
    block = tl.program_id(0)
    n = tl.load(tensor_of + block)
    start = (block - tl.load(first + n)).to(tl.int64) * _BLOCK
    row = table + n * _COLUMNS
    left = tl.minimum(tl.load(row + 4) - start, _BLOCK).to(tl.int32)
    grad, before = tl.load(grads + n), tl.load(earlier + n)
    keep, size, spread = tl.load(scalars + n * 3), tl.load(scalars + n * 3 + 1), tl.load(scalars + n * 3 + 2)
    clip = tl.load(factor)
    seed = _pcg(tl.load(row + 8).to(tl.uint32) + tl.load(steps + n).to(tl.uint32) * _STEP_FACTOR)
    for offset in range(0, _BLOCK, _TILE):
        i = offset + tl.arange(0, _TILE)
        if offset + _TILE <= left:
            _adamw_tile(
                row, grad, before, start, i, left, seed, keep, size, spread, clip, beta1, beta2, eps,
                SPLIT, HALF_GRAD, PARTS, HALF_STATE, PLACES, _YES,
            )  # fmt: skip
        elif offset < left:
            _adamw_tile(
                row, grad, before, start, i, left, seed, keep, size, spread, clip, beta1, beta2, eps,
                SPLIT, HALF_GRAD, PARTS, HALF_STATE, PLACES, _NO,
            )  # fmt: skip


kernels: Any = {"square_sum": _square_sum, "add": _add, "adamw": _adamw}  # Triton turns numbers into its own constants


@dataclass(frozen=True)
class Gradients:
    """The gradients of tensors in one launch, by `addresses`: all of one type, with earlier parts or without."""

    last: Tensor
    dtype: torch.dtype
    earlier: Tensor
    """The same addresses again where there are no earlier parts."""
    earlier_dtype: torch.dtype | None
    held: tuple[Tensor, ...]
    """What lies at the addresses; some may be copies that nobody else holds, and must live until they were read."""

    @property
    def parts(self) -> int:
        """As the kernels are told."""
        return {None: 1, torch.float32: 2, torch.bfloat16: 3}[self.earlier_dtype]


def square_sum(blocks: Blocks, grads: Gradients) -> Tensor:
    """Sum of the squares of all elements, 0-dim float32."""
    sums = torch.empty(blocks.count, dtype=torch.float32, device=grads.last.device)
    kernels["square_sum"][(blocks.count,)](
        grads.last, grads.earlier, blocks.tensor, blocks.first, blocks.size, sums,
        HALF=grads.dtype == torch.bfloat16, PARTS=grads.parts, num_warps=WARPS,
    )  # fmt: skip
    return sums.sum()


def add_gradients(blocks: Blocks, totals: Tensor, grads: Gradients) -> None:
    """totals = earlier + last, the last ones bfloat16, in float32; totals: addresses, the earlier ones' perhaps."""
    assert grads.dtype == torch.bfloat16 and grads.earlier_dtype is not None
    kernels["add"][(blocks.count,)](
        totals, grads.earlier, grads.last, blocks.tensor, blocks.first, blocks.size,
        HALF=grads.earlier_dtype == torch.bfloat16, num_warps=WARPS,
    )  # fmt: skip


def adamw(
    blocks: Blocks,
    table: Tensor,
    grads: Gradients,
    scalars: Tensor,
    steps: Tensor,
    factor: Tensor,
    skipped: Tensor,
    *,
    betas: Sequence[float],
    eps: float,
    split: bool,
    half_state: bool,
    places: bool,
) -> None:
    """Update all tensors of a kind in place, unless `skipped`.

    table: int64 [tensors, COLUMNS]; scalars: float32 [tensors, 3], 1 - lr decay, lr over the first bias correction, 1
    over the root of the second; steps: float32 [tensors], this update's number; factor, skipped: float32, 0-dim.
    split: weights have a rest; half_state: bfloat16 moments; places: some tensors are no contiguous piece.
    """
    kernels["adamw"][(blocks.count,)](
        table, grads.last, grads.earlier, blocks.tensor, blocks.first, scalars, steps, factor, skipped, *betas, eps,
        SPLIT=split, HALF_GRAD=grads.dtype == torch.bfloat16, PARTS=grads.parts, HALF_STATE=half_state, PLACES=places,
        num_warps=WARPS,
    )  # fmt: skip
