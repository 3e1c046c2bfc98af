"""Attention whose score is a quadratic polynomial of q . k, as a recurrence on explicit second-order features.

Legend: B batch, T tokens, H heads, K query/key width, F features, V value width, N documents.
"""

import math

import torch
from torch import Tensor

from torchlinearmoe.kernels.reference.spans import document_spans, tokens


def second_order_features(x: Tensor, kind: str) -> Tensor:
    """phi(x) [..., F] of x [..., K], written out entry by entry.

    "taylor": phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q . k, and F = 1 + K + K (K + 1) / 2 (Based, Arora et al. 2024,
    arXiv:2402.18668). "square": phi(q) . phi(k) = s^2, and F = K (K + 1) / 2 (Rebased, Aksenov et al. 2024,
    arXiv:2402.10644). Every product x_i x_j stands once, i <= j, and carries the weight of both orders.
    """
    K = x.shape[-1]
    pairs = [x[..., i] * x[..., j] * (1.0 if i == j else math.sqrt(2.0)) for i in range(K) for j in range(i, K)]
    if kind == "square":
        return torch.stack(pairs, -1)
    ones = torch.ones_like(x[..., :1])
    return torch.cat([ones, x, torch.stack(pairs, -1) / math.sqrt(2.0)], -1)


def quadratic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kind: str,
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = S_{t-1} + phi(k_t) [v_t, 1]^T and o_t = n_t / (d_t + eps) with [n_t, d_t] = S_t^T phi(q_t).

    phi is taken of sqrt(scale) q and sqrt(scale) k, scale > 0, default K^-0.5. Without `normalize` there is neither the
    column of ones nor the division: o_t = S_t^T phi(q_t).

    q, k: [B, T, H, K]; v: [B, T, H, V]; initial_state: [N, H, F, V + 1 or V]; cu_seqlens: [N + 1], with B == 1. Returns
    o [B, T, H, V] in q's dtype and the final states (fp32, fp64 for fp64 inputs) or None.
    """
    B, T, H, K = q.shape
    root = math.sqrt(K**-0.5 if scale is None else scale)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_BTHF, k_BTHF = (second_order_features(root * x.to(dtype), kind) for x in (q, k))
    v_BTHY = v.to(dtype)
    if normalize:
        v_BTHY = torch.cat([v_BTHY, torch.ones_like(v_BTHY[..., :1])], -1)
    outputs, finals = [], []
    for document, (row, start, end) in enumerate(document_spans(B, T, cu_seqlens)):
        S_HFY = q_BTHF.new_zeros(H, q_BTHF.shape[-1], v_BTHY.shape[-1])
        if initial_state is not None:
            S_HFY = initial_state[document].to(dtype)
        for q_HF, k_HF, v_HY in tokens(row, start, end, q_BTHF, k_BTHF, v_BTHY):
            S_HFY = S_HFY + k_HF[:, :, None] * v_HY[:, None, :]
            read_HY = (q_HF[:, :, None] * S_HFY).sum(1)
            outputs.append(read_HY[:, :-1] / (read_HY[:, -1:] + eps) if normalize else read_HY)
        finals.append(S_HFY)
    o = torch.stack(outputs).view(B, T, H, -1).to(q.dtype) if outputs else torch.zeros_like(v)
    return o, torch.stack(finals) if output_final_state else None
