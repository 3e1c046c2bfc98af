"""The delta rule with a gate per channel (Kimi Delta Attention, arXiv:2510.26692): chunks in WY form.

As in `delta.py`, with the decays inside the scores: what token t writes is
u_t = beta_t (v_t - (e^{G_t} k_t)^T E - sum_{s<t} (k_t^T diag(D_ts) k_s) u_s). Queries and keys both read the state that
their own token's gate has decayed, and keys alone write to it. Overlaps are fp32, as there.
"""

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunked.carry import Chunks, carry
from torchlinearmoe.kernels.chunked.channels import Reader, score_channels
from torchlinearmoe.kernels.chunked.decay import compute_dtype
from torchlinearmoe.kernels.chunked.layout import Layout
from torchlinearmoe.kernels.chunked.solve import solve_unit_lower


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    want_final: bool,
    layout: Layout,
) -> tuple[Tensor, Tensor | None]:
    """`reference.delta.delta_rule` for log_decay [B, T, HV, K]; q, k, v, beta as there."""
    dtype, low = compute_dtype(q), q.dtype
    V, K = v.shape[-1], k.shape[-1]
    q_C, k_C, v_C = layout.split(q.to(dtype)), layout.split(k.to(dtype)), layout.split(v)
    groups = v_C.shape[1] // q_C.shape[1]
    if groups > 1:
        q_C, k_C = q_C.repeat_interleave(groups, 1), k_C.repeat_interleave(groups, 1)
    beta_C1 = layout.split(beta.to(dtype)).unsqueeze(-1)
    parts = score_channels(layout, [Reader(q_C), Reader(k_C)], [k_C], layout.split(log_decay.to(dtype)), dtype)
    ((scores,), (overlap,)), (q_in, k_in), (k_out,) = parts.scores, parts.entered, parts.leaving
    scores = scores.to(low)
    solved = solve_unit_lower(overlap * beta_C1, torch.cat([v_C, k_in], -1) * beta_C1)
    u, w = solved.split([V, K], -1)
    u_low = u.to(low)
    chunks = Chunks(
        q_in=q_in.to(low) - torch.matmul(scores, w.to(low)),
        k_out=k_out.to(low),
        u=u_low,
        log_total=parts.log_total,
        w=w,
        prefix=parts.prefix,
    )
    entered, final = carry(layout, chunks, initial_state, want_final)
    return layout.join(layout.output(scores, u_low, entered, scale)), final
