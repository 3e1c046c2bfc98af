"""Diagonal plus low rank transitions: each token reads a row of the state, adds it back along another vector, writes.

Legend: T tokens, H heads, K/V key/value head dim, N segments.
"""

import torch
from torch import Tensor

from torchlinearmoe.kernels.operator import Backend
from torchlinearmoe.kernels.tokens import documents_of, tokens_of
from torchlinearmoe.precision import wide_type
from torchlinearmoe.segments import Segments


def dplr_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    lower_bound: float | None,
    scale: float,
    segments: Segments,
    initial_state: Tensor | None,
    want_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """S_t = diag(e^{g_t}) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T and o_t = scale * q_t^T S_t.

    Source: RWKV-7 (Peng et al. 2025, arXiv:2503.14456, eq. 17), where a = -kappa and b = kappa * eta.
    """
    H, K = q.shape[1:]
    dtype = wide_type(q.dtype)
    q_THK1, k_THK1, a_THK1, b_THK1, log_THK1 = (x.to(dtype).unsqueeze(-1) for x in (q, k, a, b, log_decay))
    v_TH1V, decay_THK1 = v.to(dtype).unsqueeze(-2), log_THK1.exp()
    outputs, finals = [], []
    for document, (start, end) in enumerate(documents_of(segments)):
        S_HKV = q_THK1.new_zeros(H, K, v.shape[-1]) if initial_state is None else initial_state[document]
        for q_HK1, k_HK1, v_H1V, a_HK1, b_HK1, decay_HK1 in tokens_of(
            start, end, q_THK1, k_THK1, v_TH1V, a_THK1, b_THK1, decay_THK1
        ):
            x_H1V = (a_HK1 * S_HKV).sum(1, keepdim=True)
            S_HKV = decay_HK1 * S_HKV + b_HK1 * x_H1V + k_HK1 * v_H1V
            outputs.append(scale * (q_HK1 * S_HKV).sum(1))
        finals.append(S_HKV)
    return torch.stack(outputs).to(q.dtype), torch.stack(finals) if want_final else None


BACKEND = Backend("reference", dplr_rule, ("dplr",))
