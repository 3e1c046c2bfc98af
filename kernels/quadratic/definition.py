"""Attention whose score is a quadratic polynomial of q . k, as a recurrence on explicit second-order features.

Legend: T tokens, H heads, K query/key width, F features, V value width, N segments.
"""

import math

import torch
from torch import Tensor

from torchlinearmoe.kernels.operator import Backend
from torchlinearmoe.kernels.quadratic.features import KINDS
from torchlinearmoe.kernels.tokens import documents_of, tokens_of
from torchlinearmoe.precision import wide_type
from torchlinearmoe.segments import Segments


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
    kind: str,
    scale: float,
    normalize: bool,
    eps: float,
    segments: Segments,
    initial_state: Tensor | None,
    want_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """S_t = S_{t-1} + phi(k_t) [v_t, 1]^T and o_t = n_t / (d_t + eps) with [n_t, d_t] = S_t^T phi(q_t).

    phi is taken of sqrt(scale) q and sqrt(scale) k. Without `normalize` there is neither the column of ones nor the
    division: o_t = S_t^T phi(q_t).
    """
    root = math.sqrt(scale)
    dtype = wide_type(q.dtype)
    q_THF, k_THF = (second_order_features(root * x.to(dtype), kind) for x in (q, k))
    v_THY = v.to(dtype)
    if normalize:
        v_THY = torch.cat([v_THY, torch.ones_like(v_THY[..., :1])], -1)
    outputs, finals = [], []
    for document, (start, end) in enumerate(documents_of(segments)):
        S_HFY = q_THF.new_zeros(q.shape[1], q_THF.shape[-1], v_THY.shape[-1])
        if initial_state is not None:
            S_HFY = initial_state[document]
        for q_HF, k_HF, v_HY in tokens_of(start, end, q_THF, k_THF, v_THY):
            S_HFY = S_HFY + k_HF[:, :, None] * v_HY[:, None, :]
            read_HY = (q_HF[:, :, None] * S_HFY).sum(1)
            outputs.append(read_HY[:, :-1] / (read_HY[:, -1:] + eps) if normalize else read_HY)
        finals.append(S_HFY)
    return torch.stack(outputs).to(q.dtype), torch.stack(finals) if want_final else None


BACKEND = Backend("reference", quadratic_attention, KINDS)
