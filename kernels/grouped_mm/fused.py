"""`F.grouped_mm`, all groups in one launch.

It is an operator of our own, because torch's fake-tensor rule knows bfloat16 only: as an opaque operator every type
compiles, and the backward takes gradients of any stride.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from torchlinearmoe.kernels.grouped_mm.opaque import as_operator
from torchlinearmoe.kernels.operator import NARROW, Backend, Call


def product(x_RM: Tensor, w_EMN: Tensor, offsets_E: Tensor) -> Tensor:
    """As `grouped_mm`."""
    if x_RM.shape[0] == 0:
        return x_RM.new_empty(0, w_EMN.shape[-1])
    return F.grouped_mm(x_RM.contiguous(), w_EMN, offs=offsets_E)


def weight_product(x_RM: Tensor, dy_RN: Tensor, offsets_E: Tensor) -> Tensor:
    """dw[e] = x[rows of e]^T @ dy[rows of e]: [E, M, N]."""
    if x_RM.shape[0] == 0:
        return x_RM.new_zeros(offsets_E.shape[0], x_RM.shape[1], dy_RN.shape[1])
    return F.grouped_mm(x_RM.contiguous().transpose(0, 1), dy_RN.contiguous(), offs=offsets_E)


def refuse(call: Call) -> str | None:
    """Rows that are not whole multiples of 16 bytes."""
    multiple = 16 // call.dtype.itemsize
    if call.channels % multiple:
        return (
            f"its rows are whole multiples of 16 bytes; make their widths multiples of {multiple}, use 'auto' or 'loop'"
        )
    return None


BACKEND = Backend(
    "grouped_mm",
    as_operator("grouped_mm", product, weight_product),
    kinds=("grouped_mm",),
    order=1,
    dtypes=NARROW,
    refuses=refuse,
)
