"""Routed experts as one call: tokens and their assignments in, each token's weighted sum out.

    y_t = sum_j w[t, j] expert_{ids[t, j]}(x_t)      expert_e(x) = (silu(x G_e) * (x U_e)) D_e, [G_e | U_e] = gate_up[e]
                                         or, relu2,  expert_e(x) = relu(x U_e)^2 D_e, U_e = gate_up[e]

where `keep` is False the term is left out. For the layers whose experts all lie on this rank; where they do not, rows
travel between the steps, and `kernels.dispatch`, `kernels.grouped_mm` and `kernels.swiglu` are called one by one.

T tokens, k experts a token, D model width, F expert width, E experts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinearmoe.kernels import dispatch, grouped_mm, swiglu
from torchlinearmoe.kernels.choose import choose
from torchlinearmoe.kernels.operator import Budget, Call, Operator

OPERATOR = Operator("experts", ("experts", "relu2"), key="moe.backend")


def call(width: int, hidden: int, device: str, dtype: torch.dtype, gated: bool = True) -> Call:
    """What the choice of a backend rests on; width, hidden: D and F."""
    return Call("experts" if gated else "relu2", device, dtype, math.gcd(width, hidden))


def routed_experts(
    x_TD: Tensor,
    ids_Tk: Tensor,
    weights_Tk: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    keep_Tk: Tensor | None = None,
    products: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """The weighted sums [T, D].

    x_TD: [T, D]; ids_Tk: int [T, k], distinct experts of each token; weights_Tk: [T, k], float32 (float64 beside
    float64); gate_up_EDF: [E, D, 2F], gate first, or [E, D, F] for relu2, and down_EFD: [E, F, D] of x's dtype;
    keep_Tk: bool [T, k], None when all stay; products: backend of the grouped products, one of `kernels/grouped_mm/`.
    """
    _, hidden, width = down_EFD.shape  # of a parameter, whose shape the compiler takes for a constant
    facts = call(width, hidden, x_TD.device.type, x_TD.dtype, gate_up_EDF.shape[2] > hidden)
    return choose(OPERATOR, backend, facts).run(x_TD, ids_Tk, weights_Tk, gate_up_EDF, down_EFD, keep_Tk, products)


def activate(hidden: Tensor, channels: int) -> Tensor:
    """What enters an expert's last matrix: silu(gate) * up of [..., 2 channels], relu^2 of [..., channels]."""
    return swiglu.swiglu(hidden) if hidden.shape[-1] > channels else F.relu(hidden).square()


def budget(tokens: int, top_k: int, width: int, hidden: int, experts: int, itemsize: int = 2) -> Budget:
    """The products' FLOPs; bytes of products, gates and movement, the rows of a step passing through memory."""
    rows = tokens * top_k
    parts = (
        dispatch.budget(tokens, top_k, width, itemsize),
        grouped_mm.budget(rows, width, 2 * hidden, experts, itemsize),
        swiglu.budget(rows, hidden, itemsize),
        grouped_mm.budget(rows, hidden, width, experts, itemsize),
    )
    return Budget(
        flops=6.0 * rows * width * hidden,
        forward_bytes=sum(part.forward_bytes for part in parts),
        backward_bytes=sum(part.backward_bytes for part in parts),
        saved_bytes=itemsize * (tokens * width + 2.0 * rows * hidden),
    )
