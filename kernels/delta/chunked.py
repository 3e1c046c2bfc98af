"""The delta rule in chunks, in WY form.

With the entering state E, what token t writes is u_t = beta_t (v_t - e^{G_t} E^T k_t - sum_{s<t} D_ts (k_t . k_s) u_s):
a unit lower triangular system whose solution is U - W E. Then o = P (U - W E) + e^G q E with P = q k^T * D, and the
chunk leaves (e^{G_C} - k_out^T W) E + k_out^T U (Yang et al. 2024, arXiv:2406.06484, section 3; with gates
arXiv:2412.06464). With a gate per channel (Kimi Delta Attention, arXiv:2510.26692) the decays are inside the scores:
queries and keys both read the state that their own token's gate has decayed. Documents decouple in the system, because
D is 0 between them.

The keys' overlaps are computed and solved in fp32: rounded to 16 bits they are most of the error where keys are alike
and beta nears 2, for there a solution stays as large as its right side, token after token.
"""

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunked.carry import Chunks, carry
from torchlinearmoe.kernels.chunked.channels import Reader, score_channels
from torchlinearmoe.kernels.chunked.layout import CHUNK_SIZE, Layout, layout_of, prepare
from torchlinearmoe.kernels.chunked.scalar_decay import scalar_decay
from torchlinearmoe.kernels.chunked.solve import solve_unit_lower
from torchlinearmoe.kernels.delta.kinds import KINDS
from torchlinearmoe.kernels.heads import repeat_heads
from torchlinearmoe.kernels.operator import Backend
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
    """As `definition.delta_rule`."""
    layout = layout_of(segments, CHUNK_SIZE, initial_state is not None or want_final)
    dtype = wide_type(q.dtype)
    beta_C1 = layout.split(beta.to(dtype)).unsqueeze(-1)
    if log_decay is not None and log_decay.dim() == 3:
        scores, chunks = per_channel(q, k, v, beta_C1, log_decay, layout)
    else:
        scores, chunks = per_head(q, k, v, beta_C1, log_decay, layout)
    entered, final = carry(layout, chunks, initial_state, want_final)
    return layout.join(layout.output(scores, chunks.u, entered, scale)), final


def per_head(
    q: Tensor, k: Tensor, v: Tensor, beta_C1: Tensor, log_decay: Tensor | None, layout: Layout
) -> tuple[Tensor, Chunks]:
    """Scores, effective queries and keys, and writes for log_decay None or [T, HV]."""
    dtype = wide_type(q.dtype)
    decay = scalar_decay(layout, log_decay, q.device, dtype)
    q_C, k_C, v_C = grouped(layout.split(q), layout.split(k), layout.split(v))
    scores = decay.apply(torch.matmul(q_C, k_C.transpose(-1, -2)))
    k_wide = k_C.to(dtype)
    overlap = decay.apply(torch.matmul(k_wide * beta_C1, k_wide.transpose(-1, -2)))
    k_in = k_wide if decay.prefix is None else k_wide * decay.prefix
    solved = solve_unit_lower(overlap, torch.cat([v_C, k_in], -1) * beta_C1)
    u, w = solved.split([v.shape[-1], k.shape[-1]], -1)
    q_in = q_C if decay.prefix is None else q_C * decay.prefix.to(q_C.dtype)
    return scores, Chunks(
        q_in=q_in - torch.matmul(scores, w.to(q.dtype)),
        k_out=k_C if decay.suffix is None else k_C * decay.suffix.to(k_C.dtype),
        u=u.to(q.dtype),
        log_total=decay.log_total,
        w=w,
        prefix=None if layout.edges is None else decay.prefix,
    )


def per_channel(
    q: Tensor, k: Tensor, v: Tensor, beta_C1: Tensor, log_decay: Tensor, layout: Layout
) -> tuple[Tensor, Chunks]:
    """The same for log_decay [T, HV, K]."""
    dtype, low = wide_type(q.dtype), q.dtype
    q_C, k_C, v_C = grouped(layout.split(q.to(dtype)), layout.split(k.to(dtype)), layout.split(v))
    parts = score_channels(layout, [Reader(q_C), Reader(k_C)], [k_C], layout.split(log_decay.to(dtype)), dtype)
    ((scores,), (overlap,)), (q_in, k_in), (k_out,) = parts.scores, parts.entered, parts.leaving
    scores = scores.to(low)
    solved = solve_unit_lower(overlap * beta_C1, torch.cat([v_C, k_in], -1) * beta_C1)
    u, w = solved.split([v.shape[-1], k.shape[-1]], -1)
    return scores, Chunks(
        q_in=q_in.to(low) - torch.matmul(scores, w.to(low)),
        k_out=k_out.to(low),
        u=u.to(low),
        log_total=parts.log_total,
        w=w,
        prefix=parts.prefix,
    )


def grouped(q_C: Tensor, k_C: Tensor, v_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys repeated to the heads of the values, [1, HV, M, C, ...]."""
    groups = v_C.shape[1] // q_C.shape[1]
    return repeat_heads(q_C, groups), repeat_heads(k_C, groups), v_C


BACKEND = Backend("torch", delta_rule, KINDS, order=0, fused=True, prepare=prepare(CHUNK_SIZE))
