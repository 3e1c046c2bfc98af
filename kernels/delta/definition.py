"""The delta rule, plain or gated per head or channel: a token erases what its key finds in the state, then writes.

Legend: T tokens, H query/key heads, HV value heads (a multiple of H), K/V key/value head dim, N segments.
"""

import torch
from torch import Tensor

from torchlinearmoe.kernels.delta.kinds import KINDS
from torchlinearmoe.kernels.operator import Backend
from torchlinearmoe.kernels.tokens import documents_of, tokens_of
from torchlinearmoe.precision import wide_type
from torchlinearmoe.segments import Segments


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    segments: Segments,
    initial_state: Tensor | None,
    want_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """S' = diag(e^{g_t}) S_{t-1}; S_t = S' + beta_t k_t (v_t - S'^T k_t)^T; o_t = scale * q_t^T S_t.

    Sources: DeltaNet (Yang et al. 2024, arXiv:2406.06484), Gated DeltaNet (arXiv:2412.06464), and with a gate per
    channel Kimi Delta Attention (arXiv:2510.26692). Value head h reads query and key head h // (HV // H).
    """
    T, H, K = q.shape
    HV, V = v.shape[-2:]
    dtype = wide_type(q.dtype)
    q_THK, k_THK = (x.to(dtype).repeat_interleave(HV // H, 1) for x in (q, k))
    v_THV, beta_TH = v.to(dtype), beta.to(dtype)
    decay = torch.ones_like(beta_TH) if log_decay is None else log_decay.to(dtype).exp()
    decay_THK1 = decay.view(T, HV, -1, 1)
    outputs, finals = [], []
    for document, (start, end) in enumerate(documents_of(segments)):
        S_HKV = q_THK.new_zeros(HV, K, V) if initial_state is None else initial_state[document]
        for q_HK, k_HK, v_HV, beta_H, decay_HK1 in tokens_of(start, end, q_THK, k_THK, v_THV, beta_TH, decay_THK1):
            k_HK1 = k_HK[:, :, None]
            S_HKV = decay_HK1 * S_HKV
            error_HV = v_HV - (k_HK1 * S_HKV).sum(1)
            S_HKV = S_HKV + k_HK1 * (beta_H[:, None] * error_HV)[:, None, :]
            outputs.append(scale * (q_HK[:, :, None] * S_HKV).sum(1))
        finals.append(S_HKV)
    return torch.stack(outputs).to(q.dtype), torch.stack(finals) if want_final else None


BACKEND = Backend("reference", delta_rule, KINDS)
