"""Gated slot attention: softmax attention over a fixed number of slots that forget and fill up token by token.

Legend: B batch, T tokens, H heads, K/V key/value head dim, S slots, N documents.
"""

import torch
from torch import Tensor

from torchlinearmoe.kernels.reference.spans import document_spans, tokens


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Slot keys K_t = K_{t-1} diag(e^{g_t}) + k_t s_t^T and slot values V_t = diag(e^{g_t}) V_{t-1} + s_t v_t^T, read
    by o_t = V_t^T softmax(scale * K_t^T q_t).

    Source: Gated Slot Attention (Zhang et al. 2024, arXiv:2409.07146), where s_t = 1 - e^{g_t}.

    q, k: [B, T, H, K]; v: [B, T, H, V]; s: [B, T, H, S]; log_decay (natural log, <= 0): [B, T, H, S];
    scale: default K^-0.5; initial_state: slot keys [N, H, K, S] and values [N, H, S, V]; cu_seqlens: [N + 1], with
    B == 1. Returns o [B, T, H, V] in q's dtype and the final slot keys and values (fp32, fp64 for fp64 inputs) or None.
    """
    B, T, H, K = q.shape
    S, V = s.shape[-1], v.shape[-1]
    factor = K**-0.5 if scale is None else scale
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_BTHK, k_BTHK, v_BTHV, s_BTHS = (x.to(dtype) for x in (q, k, v, s))
    decay_BTHS = log_decay.to(dtype).exp()
    outputs, keys, values = [], [], []
    for document, (row, start, end) in enumerate(document_spans(B, T, cu_seqlens)):
        keys_HKS, values_HSV = q_BTHK.new_zeros(H, K, S), q_BTHK.new_zeros(H, S, V)
        if initial_state is not None:
            keys_HKS, values_HSV = (state[document].to(dtype) for state in initial_state)
        for q_HK, k_HK, v_HV, s_HS, decay_HS in tokens(row, start, end, q_BTHK, k_BTHK, v_BTHV, s_BTHS, decay_BTHS):
            keys_HKS = keys_HKS * decay_HS[:, None, :] + k_HK[:, :, None] * s_HS[:, None, :]
            values_HSV = decay_HS[:, :, None] * values_HSV + s_HS[:, :, None] * v_HV[:, None, :]
            weights_HS = (factor * (q_HK[:, :, None] * keys_HKS).sum(1)).softmax(-1)
            outputs.append((weights_HS[:, :, None] * values_HSV).sum(1))
        keys.append(keys_HKS)
        values.append(values_HSV)
    o = torch.stack(outputs).view(B, T, H, V).to(q.dtype) if outputs else torch.zeros_like(v)
    return o, (torch.stack(keys), torch.stack(values)) if output_final_state else None
