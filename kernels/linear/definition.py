"""The linear recurrence, one token after the other.

Legend: T tokens, H heads, K/V key/value head dim, N segments.
"""

import torch
from torch import Tensor

from torchlinearmoe.kernels.linear.kinds import KINDS
from torchlinearmoe.kernels.operator import Backend
from torchlinearmoe.kernels.tokens import documents_of, tokens_of
from torchlinearmoe.precision import wide_type
from torchlinearmoe.segments import Segments


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    segments: Segments,
    initial_state: Tensor | None,
    want_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T and o_t = scale * q_t^T S_t; shapes as in the operator.

    With `bonus` (RWKV6, Peng et al. 2024, eq. 17) the output reads the state before the write:
    o_t = scale * q_t^T (S_{t-1} + diag(bonus) k_t v_t^T). States are fp32, fp64 for fp64 inputs.
    """
    dtype = wide_type(q.dtype)
    q_THK, k_THK, v_THV = q.to(dtype), k.to(dtype), v.to(dtype)
    decay_THK = _decay_THK(log_decay, q_THK)
    outputs, finals = [], []
    for document, (start, end) in enumerate(documents_of(segments)):
        S_HKV = q_THK.new_zeros(*q.shape[1:], v.shape[-1]) if initial_state is None else initial_state[document]
        for q_HK, k_HK, v_HV, decay_HK in tokens_of(start, end, q_THK, k_THK, v_THV, decay_THK):
            write_HKV = k_HK[:, :, None] * v_HV[:, None, :]
            S_next_HKV = decay_HK[:, :, None] * S_HKV + write_HKV
            read_HKV = S_next_HKV if bonus is None else S_HKV + bonus.to(dtype)[:, :, None] * write_HKV
            outputs.append(scale * (q_HK[:, :, None] * read_HKV).sum(1))
            S_HKV = S_next_HKV
        finals.append(S_HKV)
    return torch.stack(outputs).to(q.dtype), torch.stack(finals) if want_final else None


def _decay_THK(log_decay: Tensor | None, q: Tensor) -> Tensor:
    if log_decay is None:
        return torch.ones_like(q)
    if log_decay.dim() < 3:
        log_decay = log_decay[..., None]
    return log_decay.to(q.dtype).exp().expand_as(q)


BACKEND = Backend("reference", linear_recurrence, KINDS)
