"""The delta rule of one token a document: decoding."""

import torch
from torch import Tensor

from torchlinearmoe.kernels.delta.kinds import KINDS
from torchlinearmoe.kernels.heads import repeat_heads
from torchlinearmoe.kernels.linear.step import decayed, read_state
from torchlinearmoe.kernels.operator import Backend
from torchlinearmoe.segments import Segments


def delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    segments: Segments,
    initial_state: Tensor,
    want_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """As the operator, with T = N; the new state leaves the old one alone."""
    q, k = (repeat_heads(x, v.shape[1] // x.shape[1]) for x in (q, k))
    state = decayed(initial_state, log_decay)
    k_NHK = k.to(state.dtype)
    error = v.to(state.dtype) - torch.matmul(k_NHK.unsqueeze(-2), state).squeeze(-2)
    new_state = state + k_NHK.unsqueeze(-1) * (beta.to(state.dtype).unsqueeze(-1) * error).unsqueeze(-2)
    return read_state(q, new_state, scale), new_state if want_final else None


BACKEND = Backend("step", delta_step, KINDS, order=0, fused=True, single=True)
