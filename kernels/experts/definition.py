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
                gate_F, up_F = (x_D @ gate_up_EDF[expert].to(dtype)).chunk(2)
                y_D = y_D + weights_Tk[t, j] * ((gate_F * torch.sigmoid(gate_F) * up_F) @ down_EFD[expert].to(dtype))
        outputs.append(y_D)
    return (torch.stack(outputs) if outputs else 0 * x_TD).to(x_TD.dtype)


BACKEND = Backend("reference", experts, kinds=("experts",))
