"""Diagonal plus low rank transitions: each token reads a row of the state, adds it back along another vector, writes.

Legend: B batch, T tokens, H heads, K/V key/value head dim, N documents.
"""

import torch
from torch import Tensor

from torchlinearmoe.kernels.reference.spans import document_spans, tokens


def dplr_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = diag(e^{g_t}) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T and o_t = scale * q_t^T S_t.

    Source: RWKV-7 (Peng et al. 2025, arXiv:2503.14456, eq. 17), where a = -kappa and b = kappa * eta.

    q, k, a, b, log_decay (natural log, <= 0): [B, T, H, K]; v: [B, T, H, V]; initial_state: [N, H, K, V]; cu_seqlens:
    [N + 1], with B == 1. Returns o [B, T, H, V] in q's dtype and the final states [N, H, K, V] or None.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    factor = K**-0.5 if scale is None else scale
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_BTHK1, k_BTHK1, a_BTHK1, b_BTHK1, log_BTHK1 = (x.to(dtype).unsqueeze(-1) for x in (q, k, a, b, log_decay))
    v_BTH1V, decay_BTHK1 = v.to(dtype).unsqueeze(-2), log_BTHK1.exp()
    outputs, finals = [], []
    for document, (row, start, end) in enumerate(document_spans(B, T, cu_seqlens)):
        S_HKV = q_BTHK1.new_zeros(H, K, V) if initial_state is None else initial_state[document].to(dtype)
        for q_HK1, k_HK1, v_H1V, a_HK1, b_HK1, decay_HK1 in tokens(
            row, start, end, q_BTHK1, k_BTHK1, v_BTH1V, a_BTHK1, b_BTHK1, decay_BTHK1
        ):
            x_H1V = (a_HK1 * S_HKV).sum(1, keepdim=True)
            S_HKV = decay_HK1 * S_HKV + b_HK1 * x_H1V + k_HK1 * v_H1V
            outputs.append(factor * (q_HK1 * S_HKV).sum(1))
        finals.append(S_HKV)
    o = torch.stack(outputs).view(B, T, H, V).to(q.dtype) if outputs else torch.zeros_like(v)
    return o, torch.stack(finals) if output_final_state else None
