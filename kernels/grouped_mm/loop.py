"""A product a group: what computes where no kernel does. It copies the offsets to the host."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinearmoe.kernels.grouped_mm.opaque import as_operator
from torchlinearmoe.kernels.operator import Backend


def product(x_RM: Tensor, w_EMN: Tensor, offsets_E: Tensor) -> Tensor:
    """As `grouped_mm`."""
    y_RN = x_RM.new_empty(x_RM.shape[0], w_EMN.shape[-1])
    for w_MN, (start, end) in zip(w_EMN.unbind(0), _spans(offsets_E)):
        if end > start:
            torch.mm(x_RM[start:end], w_MN, out=y_RN[start:end])
    return y_RN


def weight_product(x_RM: Tensor, dy_RN: Tensor, offsets_E: Tensor) -> Tensor:
    """dw[e] = x[rows of e]^T @ dy[rows of e]: [E, M, N]."""
    dw_EMN = x_RM.new_zeros(offsets_E.shape[0], x_RM.shape[1], dy_RN.shape[1])
    for dw_MN, (start, end) in zip(dw_EMN.unbind(0), _spans(offsets_E)):
        if end > start:
            torch.mm(x_RM[start:end].transpose(0, 1), dy_RN[start:end], out=dw_MN)
    return dw_EMN


def _spans(offsets_E: Tensor) -> list[tuple[int, int]]:
    ends = offsets_E.tolist()
    return list(zip([0, *ends[:-1]], ends))


BACKEND = Backend("loop", as_operator("grouped_mm_loop", product, weight_product), kinds=("grouped_mm",), order=0)
