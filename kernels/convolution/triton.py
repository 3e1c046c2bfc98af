"""The short convolution by our Triton kernels: one pass over x forward, one over x and y's gradient backward.

Two operators of torch.library, forward and backward, so that torch.compile takes them into its graphs. Rows of x and of
y's gradient are read as they lie in memory, whatever their stride. Everything is computed in float32. Kept for the
backward pass is what went in; the gradients of weight and bias are sums over tiles that are added in a fixed order: the
same bits on every run.

Legend: T tokens, D channels, W kernel width, N segments.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from torchlinearmoe.kernels.convolution.chunked import last_inputs
from torchlinearmoe.kernels.operator import NARROW, Backend
from torchlinearmoe.segments import Segments

CHANNELS, SPANS = 128, 4
"""Of a tile: 4 channels a thread, a span a warp."""
LONG, SHORT = 64, 16
"""Tokens of a span, powers of 2; the shorter, the more tokens are read twice."""
MANY = 512
"""Tiles that are enough for all multiprocessors: spans are as long as leaves so many."""
AT_ONCE, AT_ONCE_BACKWARD = 8, 4
"""Tokens whose loads are on their way at once; backward there are two loads a token."""
REGISTERS = 128
"""Of a thread, backward, up to 4 taps: four programs then share a multiprocessor."""
TILE = {"B": CHANNELS, "ROWS": SPANS, "num_warps": SPANS, "enable_fp_fusion": True}


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    segments: Segments,
    initial_state: Tensor | None,
    want_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `definition.short_convolution`."""
    silu, W = activation == "silu", weight.shape[1]
    initial = None if initial_state is None or W == 1 else initial_state.to(x.dtype)
    y = convolve(x, weight, bias, initial, segments.ids, segments.borders, silu)
    return y, last_inputs(x, initial_state, segments.borders, W) if want_final else None


@torch.library.custom_op("torchlinearmoe::short_convolution", mutates_args=())
def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    ids: Tensor,
    borders: Tensor,
    silu: bool,
) -> Tensor:
    """y [T, D] in x's dtype; x: [T, D]; weight: [D, W]; bias: [D]; initial: [N, W - 1, D]; ids: [T]; borders:
    [N + 1]."""
    x, weight, bias, initial, ids = _readable(x), *_contiguous(weight, bias, initial, ids)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    grid, span = _tiles(x)
    _kernels().convolve_forward[grid](
        x, weight, _given(bias, weight), ids, _given(initial, x), y, *x.shape, x.stride(0), span,
        **_facts(weight, bias, silu), HAS_INITIAL=initial is not None, **TILE, STEP=AT_ONCE,
    )  # fmt: skip
    return y


@torch.library.custom_op("torchlinearmoe::short_convolution_backward", mutates_args=())
def convolve_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    ids: Tensor,
    borders: Tensor,
    dy: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and initial, in their dtypes; empty where there is none."""
    x, dy, weight, bias, initial, ids = _readable(x), _readable(dy), *_contiguous(weight, bias, initial, ids)
    kernels, facts, (D, W) = _kernels(), _facts(weight, bias, silu), weight.shape
    dx, dweight = torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)
    dbias, dinitial = (weight.new_empty(0) if z is None else torch.empty_like(z) for z in (bias, initial))
    grid, span = _tiles(x)
    parts = W + (bias is not None)
    sums = x.new_empty(grid[1], parts, D, dtype=torch.float32)
    kernels.convolve_backward[grid](
        x, weight, _given(bias, weight), ids, _given(initial, x), dy, dx, sums, *x.shape, x.stride(0), dy.stride(0),
        span, **facts, HAS_INITIAL=initial is not None, **TILE, STEP=AT_ONCE_BACKWARD,
        maxnreg=REGISTERS if W <= 4 else None,
    )  # fmt: skip
    kernels.convolve_sums[(-(-D // 64), parts)](
        sums, dweight, dbias, grid[1], D, W=W, HAS_BIAS=bias is not None, B=64, ROWS=16, num_warps=4
    )
    if initial is not None:
        kernels.convolve_initial[(-(-D // 128), borders.shape[0] - 1)](
            x, weight, _given(bias, weight), borders, initial, dy, dinitial, D, x.stride(0), dy.stride(0), **facts,
            B=128, num_warps=1,
        )  # fmt: skip
    return dx, dweight, dbias, dinitial


@convolve.register_fake
def _(x, weight, bias, initial, ids, borders, silu):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@convolve_backward.register_fake
def _(x, weight, bias, initial, ids, borders, dy, silu):
    likes = (x, weight, *(weight.new_empty(0) if z is None else z for z in (bias, initial)))
    return tuple(torch.empty_like(z, memory_format=torch.contiguous_format) for z in likes)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, initial, ids, borders = ctx.saved_tensors
    dx, dweight, dbias, dinitial = convolve_backward(x, weight, bias, initial, ids, borders, dy, ctx.silu)
    return dx, dweight, None if bias is None else dbias, None if initial is None else dinitial, None, None, None


convolve.register_autograd(_backward, setup_context=_save)


@functools.cache
def _kernels() -> Any:  # Triton turns numbers into its own constants
    return importlib.import_module("torchlinearmoe.kernels.convolution.triton_kernels")


def _tiles(x: Tensor) -> tuple[tuple[int, int], int]:
    """The grid over blocks of channels and tiles of tokens, and the tokens of a span."""
    T, D = x.shape
    blocks, span = -(-D // CHANNELS), LONG
    while span > SHORT and blocks * T < MANY * SPANS * span:
        span //= 2
    return (blocks, -(-T // (SPANS * span))), span


def _facts(weight: Tensor, bias: Tensor | None, silu: bool) -> dict[str, Any]:
    W = weight.shape[1]
    return {"W": W, "PADDED": 1 << (W - 1).bit_length(), "HAS_BIAS": bias is not None, "SILU": silu}


def _readable(x: Tensor) -> Tensor:
    """x, or a copy where the channels of a token do not lie side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def _contiguous(*xs: Any) -> Any:
    return tuple(None if x is None else x.contiguous() for x in xs)


def _given(x: Tensor | None, other: Tensor) -> Tensor:
    """A kernel's pointer; one that it does not use where there is none."""
    return other if x is None else x


BACKEND = Backend(
    "triton",
    short_convolution,
    ("convolution",),
    order=10,
    dtypes=NARROW,
    devices=frozenset(("cuda",)),
    needs=("triton",),
    install="pip install triton",
    graphed=True,
)
