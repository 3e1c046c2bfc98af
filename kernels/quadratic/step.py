"""Quadratic attention of one token a document: decoding."""

import torch
from torch import Tensor

from torchlinearmoe.kernels.operator import Backend
from torchlinearmoe.kernels.quadratic.features import KINDS, QuadraticFeatures
from torchlinearmoe.segments import Segments


def quadratic_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: str,
    scale: float,
    normalize: bool,
    eps: float,
    segments: Segments,
    initial_state: Tensor,
    want_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """As the operator, with T = N; the new state leaves the old one alone."""
    state = initial_state
    phi = QuadraticFeatures(kind, q.shape[-1], scale, q.device)
    write = v.to(state.dtype)
    if normalize:
        write = torch.cat([write, torch.ones_like(write[..., :1])], -1)
    new_state = state + phi.features(k.to(state.dtype)).unsqueeze(-1) * write.unsqueeze(-2)
    read = torch.matmul(phi.features(q.to(state.dtype)).unsqueeze(-2), new_state).squeeze(-2)
    if normalize:
        read = read[..., :-1] / (read[..., -1:] + eps)
    return read.to(q.dtype), new_state if want_final else None


BACKEND = Backend("step", quadratic_step, KINDS, order=0, fused=True, single=True)
