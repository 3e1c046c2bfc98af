"""Our Triton kernels: two launches to sort, one to move rows, no index arithmetic between them.

Operators of torch.library, so that torch.compile takes them into its graphs. Bytes a call, for R rows of T tokens, D
wide: `spread` and its gradient write or read R D once, and T D beside it; so does
`weighted_sum`, whose gradient reads and writes R D once, where PyTorch reads it twice. Sums are in float32 and in one
order: the same bits on every run.

T tokens, k experts a token, R = T * k rows, D width, E experts.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from torchlinearmoe.kernels.operator import NARROW, Backend

BLOCKS = 256
"""That the assignments are sorted in, at most: each reads the counts of all."""
HOT = 8192
"""Elements of a tile of assignments by experts."""
MOVED, SUMMED = 2048, 1024
"""Elements of a tile of rows that are copied, and of one that k rows are summed in, in 128 threads."""
WIDEST = 1024
"""Columns of a tile."""


def sort(ids_Tk: Tensor, num_experts: int, keep_Tk: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.dispatch.sort`."""
    return sorted_rows(ids_Tk, num_experts, keep_Tk)[:3]


@torch.library.custom_op("torchlinearmoe::sort_by_expert", mutates_args=())
def sorted_rows(ids_Tk: Tensor, num_experts: int, keep_Tk: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """order [R], inverse [T, k], counts [E] in int64 as `sort`, and their running sums int32 [E]."""
    order_R, inverse_Tk, counts_E, offsets_E = _empty(ids_Tk, num_experts)
    R, ids, keep = order_R.shape[0], ids_Tk.contiguous(), None if keep_Tk is None else keep_Tk.contiguous()
    bins = max(16, 1 << (num_experts + (keep is not None) - 1).bit_length())
    tile = max(16, min(256, HOT // bins))
    span = tile * max(1, -(-R // (tile * BLOCKS)))
    blocks = max(1, -(-R // span))
    block_counts = torch.empty(blocks, bins, dtype=torch.int32, device=ids.device)
    given = ids if keep is None else keep
    facts = {"E": num_experts, "DROPS": keep is not None, "S": tile, "BINS": bins, "num_warps": 4}
    kernels().sort_count[(blocks,)](ids, given, block_counts, R, span, **facts)
    kernels().sort_scatter[(blocks,)](
        ids, given, block_counts, order_R, inverse_Tk, counts_E, offsets_E, R, span, blocks, **facts,
        AT_ONCE=max(1, min(64, HOT // bins)),
    )  # fmt: skip
    return order_R, inverse_Tk, counts_E, offsets_E


@torch.library.custom_op("torchlinearmoe::spread_rows", mutates_args=())
def spread(x_TD: Tensor, order_R: Tensor, inverse_Tk: Tensor) -> Tensor:
    """As `kernels.dispatch.spread`."""
    return spread_tokens(x_TD, inverse_Tk)


@torch.library.custom_op("torchlinearmoe::sum_rows", mutates_args=())
def collect(rows_RD: Tensor, order_R: Tensor, inverse_Tk: Tensor) -> Tensor:
    """y_t = sum_j rows[inverse[t, j]], [T, D]: the gradient of `spread`, whose gradient is `spread`."""
    return gather_sum(rows_RD, None, inverse_Tk)


@torch.library.custom_op("torchlinearmoe::weighted_sum_of_rows", mutates_args=())
def weighted_sum(rows_RD: Tensor, weights_Tk: Tensor, order_R: Tensor, inverse_Tk: Tensor) -> Tensor:
    """As `kernels.dispatch.weighted_sum`."""
    return gather_sum(rows_RD, weights_Tk, inverse_Tk)


@torch.library.custom_op("torchlinearmoe::weighted_sum_of_rows_backward", mutates_args=())
def weighted_sum_backward(rows_RD: Tensor, weights_Tk: Tensor, order_R: Tensor, dy_TD: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of rows and weights, in their types."""
    rows_RD, dy_TD, weights_Tk = readable(rows_RD), readable(dy_TD), weights_Tk.contiguous()
    drows_RD, dweights_Tk = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (rows_RD, weights_Tk))
    B = _columns(rows_RD.shape[1])
    kernels().gather_weighted[(-(-rows_RD.shape[0] // (MOVED // B)),)](
        rows_RD, weights_Tk, order_R.contiguous(), dy_TD, drows_RD, dweights_Tk, *rows_RD.shape, rows_RD.stride(0),
        dy_TD.stride(0), K=weights_Tk.shape[1], ROWS=MOVED // B, B=B, num_warps=4,
    )  # fmt: skip
    return drows_RD, dweights_Tk


def spread_tokens(x_TD: Tensor, inverse_Tk: Tensor, limit: Tensor | None = None) -> Tensor:
    """y[inverse[t, j]] = x[t], [R, D]; limit: int32 [1], the first row that is not wanted and left as it is."""
    x_TD, (T, k), D = readable(x_TD), inverse_Tk.shape, x_TD.shape[1]
    y_RD, B = x_TD.new_empty(T * k, D), _columns(D)
    tokens = MOVED // B
    kernels().scatter_tokens[-(-T // tokens), -(-D // B)](
        x_TD, inverse_Tk.contiguous(), inverse_Tk if limit is None else limit, y_RD, T, D, x_TD.stride(0),
        K=k, LIMITED=limit is not None, TOKENS=tokens, B=B, num_warps=4,
    )  # fmt: skip
    return y_RD


def gather_sum(rows_RD: Tensor, weights_Tk: Tensor | None, inverse_Tk: Tensor, limit: Tensor | None = None) -> Tensor:
    """y_t = sum_j [w[t, j]] rows[inverse[t, j]], [T, D]; limit: int32 [1], the first row that counts as zeros."""
    rows_RD, (T, k), D = readable(rows_RD), inverse_Tk.shape, rows_RD.shape[1]
    y_TD, B = rows_RD.new_empty(T, D), _columns(D)
    tokens = SUMMED // B
    kernels().gather_sum[-(-T // tokens), -(-D // B)](
        rows_RD, rows_RD if weights_Tk is None else weights_Tk.contiguous(), inverse_Tk.contiguous(),
        inverse_Tk if limit is None else limit, y_TD, T, D, rows_RD.stride(0),
        K=k, WEIGHTED=weights_Tk is not None, LIMITED=limit is not None, TOKENS=tokens, B=B, num_warps=4,
    )  # fmt: skip
    return y_TD


def readable(x: Tensor) -> Tensor:
    """x, or a copy where the columns of a row do not lie side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def _columns(width: int) -> int:
    return min(WIDEST, 1 << max(width - 1, 0).bit_length())


def _empty(ids_Tk: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ints = functools.partial(ids_Tk.new_empty, dtype=torch.int64)
    offsets_E = ids_Tk.new_empty(num_experts, dtype=torch.int32)
    return ints(ids_Tk.numel()), ints(ids_Tk.shape), ints(num_experts), offsets_E


@functools.cache
def kernels() -> Any:  # Triton turns numbers into its own constants
    """The kernels, imported by the first call."""
    return importlib.import_module("torchlinearmoe.kernels.dispatch.triton_kernels")


@sorted_rows.register_fake
def _(ids_Tk, num_experts, keep_Tk):
    return _empty(ids_Tk, num_experts)


@spread.register_fake
def _(x_TD, order_R, inverse_Tk):
    return x_TD.new_empty(order_R.shape[0], x_TD.shape[1])


@collect.register_fake
def _(rows_RD, order_R, inverse_Tk):
    return rows_RD.new_empty(inverse_Tk.shape[0], rows_RD.shape[1])


@weighted_sum.register_fake
def _(rows_RD, weights_Tk, order_R, inverse_Tk):
    return rows_RD.new_empty(inverse_Tk.shape[0], rows_RD.shape[1])


@weighted_sum_backward.register_fake
def _(rows_RD, weights_Tk, order_R, dy_TD):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (rows_RD, weights_Tk))


def _keep_indices(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _keep_all(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _weighted_sum_gradients(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
    rows_RD, weights_Tk, order_R, _ = ctx.saved_tensors
    return *weighted_sum_backward(rows_RD, weights_Tk, order_R, dy_TD), None, None


spread.register_autograd(lambda ctx, d: (collect(d, *ctx.saved_tensors), None, None), setup_context=_keep_indices)
collect.register_autograd(lambda ctx, d: (spread(d, *ctx.saved_tensors), None, None), setup_context=_keep_indices)
weighted_sum.register_autograd(_weighted_sum_gradients, setup_context=_keep_all)


def run(kind: str, *arguments: Any) -> Any:
    """The function of a kind."""
    return {"sort": sort, "spread": spread, "weighted_sum": weighted_sum}[kind](*arguments)


BACKEND = Backend(
    "triton",
    run,
    kinds=("sort", "spread", "weighted_sum"),
    order=10,
    dtypes=NARROW,
    devices=frozenset(("cuda",)),
    needs=("triton",),
    install="pip install triton",
    graphed=True,
)
