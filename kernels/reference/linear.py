"""Linear recurrences with a decay that is absent, one number per head, one per token and head, or one per channel.

Legend: B batch, T tokens, H heads, K/V key/value head dim, N documents.
"""

import torch
from torch import Tensor

from torchlinearmoe.kernels.reference.spans import document_spans, tokens


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    bonus: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T and o_t = scale * q_t^T S_t, one token after the other.

    With `bonus` (RWKV6, Peng et al. 2024, eq. 17) the output reads the state before the write:
    o_t = scale * q_t^T (S_{t-1} + diag(bonus) k_t v_t^T).

    q, k: [B, T, H, K]; v: [B, T, H, V]; log_decay (natural log, <= 0): None, [H], [B, T, H] or [B, T, H, K];
    bonus: [H, K]; initial_state: [N, H, K, V]; cu_seqlens: [N + 1], with B == 1. Returns o [B, T, H, V] in q's dtype
    and the final states [N, H, K, V] (fp32, fp64 for fp64 inputs) or None.
    """
    B, T, H, K = q.shape
    factor = K**-0.5 if scale is None else scale
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_BTHK, k_BTHK, v_BTHV = q.to(dtype), k.to(dtype), v.to(dtype)
    decay = _decay_BTHK(log_decay, q_BTHK)
    outputs, finals = [], []
    for document, (row, start, end) in enumerate(document_spans(B, T, cu_seqlens)):
        S_HKV = q_BTHK.new_zeros(H, K, v.shape[-1]) if initial_state is None else initial_state[document].to(dtype)
        for q_HK, k_HK, v_HV, decay_HK in tokens(row, start, end, q_BTHK, k_BTHK, v_BTHV, decay):
            write_HKV = k_HK[:, :, None] * v_HV[:, None, :]
            S_next_HKV = decay_HK[:, :, None] * S_HKV + write_HKV
            read_HKV = S_next_HKV if bonus is None else S_HKV + bonus.to(dtype)[:, :, None] * write_HKV
            outputs.append(factor * (q_HK[:, :, None] * read_HKV).sum(1))
            S_HKV = S_next_HKV
        finals.append(S_HKV)
    o = torch.stack(outputs).view(B, T, H, -1).to(q.dtype) if outputs else torch.zeros_like(v)
    return o, torch.stack(finals) if output_final_state else None


def _decay_BTHK(log_decay: Tensor | None, q: Tensor) -> Tensor:
    if log_decay is None:
        return torch.ones_like(q)
    if log_decay.dim() < 4:
        log_decay = log_decay[..., None]
    return log_decay.to(q.dtype).exp().expand_as(q)
