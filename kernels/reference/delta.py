"""The delta rule, plain or gated per head or channel: a token erases what its key finds in the state, then writes.

Legend: B batch, T tokens, H query/key heads, HV value heads (a multiple of H), K/V key/value head dim, N documents.
"""

import torch
from torch import Tensor

from torchlinearmoe.kernels.reference.spans import document_spans, tokens


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S' = diag(e^{g_t}) S_{t-1}; S_t = S' + beta_t k_t (v_t - S'^T k_t)^T; o_t = scale * q_t^T S_t.

    Sources: DeltaNet (Yang et al. 2024, arXiv:2406.06484), Gated DeltaNet (arXiv:2412.06464), and with a gate per
    channel Kimi Delta Attention (arXiv:2510.26692).

    q, k: [B, T, H, K]; v: [B, T, HV, V]; beta: [B, T, HV]; log_decay (natural log, <= 0): None, [B, T, HV] or
    [B, T, HV, K]; initial_state: [N, HV, K, V]; cu_seqlens: [N + 1], with B == 1. Value head h reads query and key
    head h // (HV // H). Returns o [B, T, HV, V] in q's dtype and the final states [N, HV, K, V] or None.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[-2:]
    factor = K**-0.5 if scale is None else scale
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_BTHK, k_BTHK = (x.to(dtype).repeat_interleave(HV // H, 2) for x in (q, k))
    v_BTHV, beta_BTH = v.to(dtype), beta.to(dtype)
    decay = torch.ones_like(beta_BTH) if log_decay is None else log_decay.to(dtype).exp()
    decay = decay.view(B, T, HV, -1, 1)
    outputs, finals = [], []
    for document, (row, start, end) in enumerate(document_spans(B, T, cu_seqlens)):
        S_HKV = q_BTHK.new_zeros(HV, K, V) if initial_state is None else initial_state[document].to(dtype)
        for q_HK, k_HK, v_HV, beta_H, decay_HK1 in tokens(row, start, end, q_BTHK, k_BTHK, v_BTHV, beta_BTH, decay):
            k_HK1 = k_HK[:, :, None]
            S_HKV = decay_HK1 * S_HKV
            error_HV = v_HV - (k_HK1 * S_HKV).sum(1)
            S_HKV = S_HKV + k_HK1 * (beta_H[:, None] * error_HV)[:, None, :]
            outputs.append(factor * (q_HK[:, :, None] * S_HKV).sum(1))
        finals.append(S_HKV)
    o = torch.stack(outputs).view(B, T, HV, V).to(q.dtype) if outputs else torch.zeros_like(v)
    return o, torch.stack(finals) if output_final_state else None
