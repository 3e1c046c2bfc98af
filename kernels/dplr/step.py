"""Diagonal plus low rank transitions of one token a document: decoding."""

import torch
from torch import Tensor

from torchlinearmoe.kernels.linear.step import decayed, read_state
from torchlinearmoe.kernels.operator import Backend
from torchlinearmoe.segments import Segments


def dplr_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    lower_bound: float | None,
    scale: float,
    segments: Segments,
    initial_state: Tensor,
    want_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """As the operator, with T = N; the new state leaves the old one alone."""
    state = initial_state
    x = torch.matmul(a.to(state.dtype).unsqueeze(-2), state)
    write = k.to(state.dtype).unsqueeze(-1) * v.to(state.dtype).unsqueeze(-2)
    new_state = decayed(state, log_decay) + b.to(state.dtype).unsqueeze(-1) * x + write
    return read_state(q, new_state, scale), new_state if want_final else None


BACKEND = Backend("step", dplr_step, ("dplr",), order=0, fused=True, single=True)
