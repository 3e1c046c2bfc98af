"""Linear recurrences with a decay per channel (GLA, HGRN2, RWKV6)."""

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunked.carry import Chunks, carry
from torchlinearmoe.kernels.chunked.decay import FLOOR, compute_dtype, decay_factor, running_sum
from torchlinearmoe.kernels.chunked.halving import halved_scores
from torchlinearmoe.kernels.chunked.layout import Layout
from torchlinearmoe.kernels.chunked.subblocks import SIZE as SUBBLOCK
from torchlinearmoe.kernels.chunked.subblocks import subblock_scores


def linear_diagonal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    want_final: bool,
    layout: Layout,
) -> tuple[Tensor, Tensor | None]:
    """`reference.linear.linear_recurrence` for log_decay [B, T, H, K]; q, k, v, bonus as there."""
    dtype = compute_dtype(q)
    q_C, k_C, v_C = layout.split(q.to(dtype)), layout.split(k.to(dtype)), layout.split(v)
    log_C = layout.split(log_decay.to(dtype))
    reads_before_write = bonus is not None
    if torch.compiler.is_compiling() and layout.C % SUBBLOCK == 0:
        own = None if bonus is None else (q_C * k_C * bonus.to(dtype)[:, None, None]).sum(-1)
        scores, q_in, k_out = subblock_scores(q_C, k_C, log_C, own, v.dtype)
    else:
        decay = decay_factor(log_C, dtype)
        own = q_C * k_C if bonus is None else q_C * k_C * bonus.to(dtype)[:, None, None]
        q_first = q_C if reads_before_write else q_C * decay
        scores, q_in, k_out = halved_scores(q_first, k_C, decay, own.sum(-1), v.dtype)
    prefix = None
    if layout.documents is not None:
        scores = scores * layout.documents.same_MCC
        if layout.edges is not None:
            prefix, prefix_before, suffix = _document_decays(layout, log_C)
            q_in, k_out = q_C * (prefix_before if reads_before_write else prefix), k_C * suffix
    log_total = log_C.clamp(min=FLOOR).sum(-2)
    chunks = Chunks(q_in.to(v.dtype), k_out.to(v.dtype), v_C, log_total, None, prefix)
    entered, final = carry(layout, chunks, initial_state, want_final)
    return layout.join(layout.output(scores, v_C, entered, scale)), final


def _document_decays(layout: Layout, log_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decays since a token's document entered the chunk (its own included, excluded), and until it leaves."""
    assert layout.documents is not None
    total = running_sum(log_C, -2)
    before = torch.cat([torch.zeros_like(total[..., :1, :]), total[..., :-1, :]], -2)
    first = layout.documents.first_MC.unsqueeze(-1).expand(total.shape)
    final = layout.documents.final_MC.unsqueeze(-1).expand(total.shape)
    since, until = before.gather(-2, first), total.gather(-2, final)
    return (
        decay_factor(total - since, log_C.dtype),
        decay_factor(before - since, log_C.dtype),
        decay_factor(until - total, log_C.dtype),
    )
