"""Gated slot attention: softmax attention over a fixed number of slots that forget and fill up token by token.

Legend: T tokens, H heads, K/V key/value head dim, S slots, N segments.
"""

import torch
from torch import Tensor

from torchlinearmoe.kernels.operator import Backend
from torchlinearmoe.kernels.slots.kinds import KINDS
from torchlinearmoe.kernels.tokens import documents_of, tokens_of
from torchlinearmoe.precision import wide_type
from torchlinearmoe.segments import Segments


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    log_decay: Tensor,
    scale: float,
    segments: Segments,
    initial_state: tuple[Tensor, Tensor] | None,
    want_final: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Slot keys K_t = K_{t-1} diag(e^{g_t}) + k_t s_t^T and slot values V_t = diag(e^{g_t}) V_{t-1} + s_t v_t^T, read
    by o_t = V_t^T softmax(scale * K_t^T q_t).

    Source: Gated Slot Attention (Zhang et al. 2024, arXiv:2409.07146), where s_t = 1 - e^{g_t}.
    """
    H, K = q.shape[1:]
    S, V = s.shape[-1], v.shape[-1]
    dtype = wide_type(q.dtype)
    q_THK, k_THK, v_THV, s_THS = (x.to(dtype) for x in (q, k, v, s))
    decay_THS = log_decay.to(dtype).exp()
    outputs, keys, values = [], [], []
    for document, (start, end) in enumerate(documents_of(segments)):
        keys_HKS, values_HSV = q_THK.new_zeros(H, K, S), q_THK.new_zeros(H, S, V)
        if initial_state is not None:
            keys_HKS, values_HSV = (state[document] for state in initial_state)
        for q_HK, k_HK, v_HV, s_HS, decay_HS in tokens_of(start, end, q_THK, k_THK, v_THV, s_THS, decay_THS):
            keys_HKS = keys_HKS * decay_HS[:, None, :] + k_HK[:, :, None] * s_HS[:, None, :]
            values_HSV = decay_HS[:, :, None] * values_HSV + s_HS[:, :, None] * v_HV[:, None, :]
            weights_HS = (scale * (q_HK[:, :, None] * keys_HKS).sum(1)).softmax(-1)
            outputs.append((weights_HS[:, :, None] * values_HSV).sum(1))
        keys.append(keys_HKS)
        values.append(values_HSV)
    return torch.stack(outputs).to(q.dtype), (torch.stack(keys), torch.stack(values)) if want_final else None


BACKEND = Backend("reference", slot_attention, KINDS)
