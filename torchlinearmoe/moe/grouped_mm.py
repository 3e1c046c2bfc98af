"""One matrix multiplication a group of rows: the product under every expert layer, forward and backward.

    rows     x_RM        [a a a b d d]          offsets_E = [3, 4, 4, 6]: where each group ends
    weights  w_EMN       A B C D                group c is empty
    out      y_RN        [aA aA aA bB dD dD]

`F.grouped_mm` wrapped as an operator of our own, because its fake-tensor rule knows bf16 only: as an opaque operator
every dtype compiles, and the backward takes gradients of any stride. Where `F.grouped_mm` has no kernel (fp64, rows
that are not whole multiples of 16 bytes) the same operator loops over the groups, which is also its oracle.

Rows past `offsets_E[-1]` belong to no group: their outputs and their gradients are unspecified memory, as in
`F.grouped_mm`; whoever hands in such rows masks them (see `Experts`). They never reach a weight gradient.

R rows, M inner width, N outer width, E groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("auto", "grouped_mm", "loop")
_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pick_backend(backend: str, dtype: torch.dtype, widths: tuple[int, ...]) -> str:
    """Resolve "auto" to "grouped_mm" or "loop" for this dtype and these row widths.

    Raises ValueError when "grouped_mm" is asked for and cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"moe.backend = {backend!r}: must be one of {', '.join(BACKENDS)}")
    if backend == "loop":
        return backend
    runs = dtype in _FUSED_DTYPES and all(width * dtype.itemsize % 16 == 0 for width in widths)
    if backend == "grouped_mm" and not runs:
        raise ValueError(
            f"moe.backend = 'grouped_mm' cannot multiply {dtype} of widths {widths}: needs float32, bfloat16 or "
            "float16 rows of whole multiples of 16 bytes; use 'auto' or 'loop'"
        )
    return "grouped_mm" if runs else "loop"


def _spans(offsets_E: Tensor) -> list[tuple[int, int]]:
    ends = offsets_E.tolist()
    return list(zip([0, *ends[:-1]], ends))


@torch.library.custom_op("torchlinearmoe::grouped_mm", mutates_args=())
def grouped_mm(x_RM: Tensor, w_EMN: Tensor, offsets_E: Tensor, backend: str) -> Tensor:
    """y[r] = x[r] @ w[group of r].

    x_RM: [R, M], rows sorted by group; w_EMN: [E, M, N] of the same dtype, any strides; offsets_E: int32 [E],
    cumulative group sizes; backend: "grouped_mm" or "loop" (which copies the offsets to the host). Returns [R, N].
    """
    if backend == "grouped_mm" and x_RM.shape[0] > 0:
        return F.grouped_mm(x_RM.contiguous(), w_EMN, offs=offsets_E)
    y_RN = x_RM.new_empty(x_RM.shape[0], w_EMN.shape[-1])
    for w_MN, (start, end) in zip(w_EMN.unbind(0), _spans(offsets_E)):
        if end > start:
            torch.mm(x_RM[start:end], w_MN, out=y_RN[start:end])
    return y_RN


@torch.library.custom_op("torchlinearmoe::grouped_mm_weight", mutates_args=())
def grouped_mm_weight(x_RM: Tensor, dy_RN: Tensor, offsets_E: Tensor, backend: str) -> Tensor:
    """dw[e] = x[rows of e]^T @ dy[rows of e]: [E, M, N], zero for an empty group."""
    if backend == "grouped_mm" and x_RM.shape[0] > 0:
        return F.grouped_mm(x_RM.contiguous().transpose(0, 1), dy_RN.contiguous(), offs=offsets_E)
    dw_EMN = x_RM.new_empty(offsets_E.shape[0], x_RM.shape[1], dy_RN.shape[1])
    for dw_MN, (start, end) in zip(dw_EMN.unbind(0), _spans(offsets_E)):
        if end > start:
            torch.mm(x_RM[start:end].transpose(0, 1), dy_RN[start:end], out=dw_MN)
        else:
            dw_MN.zero_()
    return dw_EMN


@grouped_mm.register_fake
def _(x_RM, w_EMN, offsets_E, backend):
    return x_RM.new_empty(x_RM.shape[0], w_EMN.shape[-1])


@grouped_mm_weight.register_fake
def _(x_RM, dy_RN, offsets_E, backend):
    return x_RM.new_empty(offsets_E.shape[0], x_RM.shape[1], dy_RN.shape[1])


def _save(ctx, inputs, output):
    x_RM, w_EMN, offsets_E, ctx.backend = inputs
    ctx.save_for_backward(x_RM, w_EMN, offsets_E)


def _backward(ctx, dy_RN):
    x_RM, w_EMN, offsets_E = ctx.saved_tensors
    dx_RM = dw_EMN = None
    if ctx.needs_input_grad[0]:
        dx_RM = grouped_mm(dy_RN, w_EMN.transpose(1, 2), offsets_E, ctx.backend)
    if ctx.needs_input_grad[1]:
        dw_EMN = grouped_mm_weight(x_RM, dy_RN, offsets_E, ctx.backend)
    return dx_RM, dw_EMN, None, None


grouped_mm.register_autograd(_backward, setup_context=_save)
