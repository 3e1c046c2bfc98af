"""State space duality, one token after the other.

Legend: T tokens, H heads, G groups of heads, K state dim, V head dim, N segments.
"""

import torch
from torch import Tensor

from torchlinearmoe.kernels.operator import Backend
from torchlinearmoe.kernels.tokens import documents_of, tokens_of
from torchlinearmoe.precision import wide_type
from torchlinearmoe.segments import Segments


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    segments: Segments,
    initial_state: Tensor | None,
    want_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """S_t = e^{dt_t A} S_{t-1} + B_t (dt_t x_t)^T and y_t = C_t^T S_t; head h reads group h // (H // G)."""
    H, V = x.shape[1:]
    G, K = B.shape[1:]
    dtype = wide_type(x.dtype)
    B_THK, C_THK = (part.to(dtype).repeat_interleave(H // G, 1) for part in (B, C))
    x_THV, dt_TH, A_H = x.to(dtype), dt.to(dtype), A.to(dtype)
    outputs, finals = [], []
    for document, (start, end) in enumerate(documents_of(segments)):
        S_HKV = x_THV.new_zeros(H, K, V) if initial_state is None else initial_state[document]
        for x_HV, dt_H, B_HK, C_HK in tokens_of(start, end, x_THV, dt_TH, B_THK, C_THK):
            decay_H11 = (dt_H * A_H).exp()[:, None, None]
            S_HKV = decay_H11 * S_HKV + B_HK[:, :, None] * (dt_H[:, None] * x_HV)[:, None, :]
            outputs.append((C_HK[:, :, None] * S_HKV).sum(1))
        finals.append(S_HKV)
    return torch.stack(outputs).to(x.dtype), torch.stack(finals) if want_final else None


BACKEND = Backend("reference", ssd, ("ssd",))
