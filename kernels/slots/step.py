"""Gated slot attention of one token a document: decoding."""

import torch
from torch import Tensor

from torchlinearmoe.kernels.operator import Backend
from torchlinearmoe.kernels.slots.kinds import KINDS
from torchlinearmoe.segments import Segments


def slot_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    log_decay: Tensor,
    scale: float,
    segments: Segments,
    initial_state: tuple[Tensor, Tensor],
    want_final: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """As the operator, with T = N; the new states leave the old ones alone."""
    keys, values = initial_state
    s_NHS = s.to(keys.dtype)
    decay = log_decay.to(keys.dtype).exp()
    keys = keys * decay.unsqueeze(-2) + k.to(keys.dtype).unsqueeze(-1) * s_NHS.unsqueeze(-2)
    values = values * decay.unsqueeze(-1) + s_NHS.unsqueeze(-1) * v.to(values.dtype).unsqueeze(-2)
    weights = (scale * torch.matmul(q.to(keys.dtype).unsqueeze(-2), keys)).softmax(-1)
    return torch.matmul(weights, values).squeeze(-2).to(q.dtype), (keys, values) if want_final else None


BACKEND = Backend("step", slot_step, KINDS, order=0, fused=True, single=True)
