"""The linear recurrence of one token a document: decoding."""

import torch
from torch import Tensor

from torchlinearmoe.kernels.linear.kinds import KINDS
from torchlinearmoe.kernels.operator import Backend
from torchlinearmoe.segments import Segments


def linear_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    segments: Segments,
    initial_state: Tensor,
    want_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """As the operator, with T = N; the new state leaves the old one alone."""
    state = initial_state
    write = k.to(state.dtype).unsqueeze(-1) * v.to(state.dtype).unsqueeze(-2)
    new_state = write + decayed(state, log_decay)
    read = new_state if bonus is None else state + bonus.to(state.dtype).unsqueeze(-1) * write
    return read_state(q, read, scale), new_state if want_final else None


def decayed(state: Tensor, log_decay: Tensor | None) -> Tensor:
    """state [N, H, K, V] after a decay of None, [H], [N, H] or [N, H, K]."""
    if log_decay is None:
        return state
    decay = log_decay.to(state.dtype).exp()
    if log_decay.dim() < 3:
        return decay[..., None, None] * state
    return decay.unsqueeze(-1) * state


def read_state(q: Tensor, state: Tensor, scale: float) -> Tensor:
    """scale * q^T S in q's dtype; q: [N, H, K]."""
    return (scale * torch.matmul(q.to(state.dtype).unsqueeze(-2), state).squeeze(-2)).to(q.dtype)


BACKEND = Backend("step", linear_step, KINDS, order=0, fused=True, single=True)
