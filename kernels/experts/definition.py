"""The definition: every token by itself, an expert after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinearmoe.kernels.operator import Backend
from torchlinearmoe.precision import wide_type


def experts(
    x_TD: Tensor,
    ids_Tk: Tensor,
    weights_Tk: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    keep_Tk: Tensor | None,
    products: str,
) -> Tensor:
    """As `routed_experts`; it has no grouped products."""
    dtype = wide_type(x_TD.dtype)
    outputs = []
    for t, x_D in enumerate(x_TD.to(dtype)):
        y_D = 0 * x_D
        for j, expert in enumerate(ids_Tk[t].tolist()):
            if keep_Tk is None or keep_Tk[t, j]:
                hidden_F = _activate(x_D @ gate_up_EDF[expert].to(dtype), down_EFD.shape[1])
                y_D = y_D + weights_Tk[t, j] * (hidden_F @ down_EFD[expert].to(dtype))
        outputs.append(y_D)
    return (torch.stack(outputs) if outputs else 0 * x_TD).to(x_TD.dtype)


def _activate(hidden: Tensor, channels: int) -> Tensor:
    if hidden.shape[0] == channels:
        return torch.where(hidden > 0, hidden * hidden, 0)
    gate_F, up_F = hidden.chunk(2)
    return gate_F * torch.sigmoid(gate_F) * up_F


BACKEND = Backend("reference", experts, kinds=("experts", "relu2"))
