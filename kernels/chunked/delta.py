"""The delta rule, plain or with a gate per head: chunks in WY form.

With the entering state E, what token t writes is u_t = beta_t (v_t - e^{G_t} E^T k_t - sum_{s<t} D_ts (k_t . k_s) u_s):
a unit lower triangular system whose solution is U - W E. Then o = P (U - W E) + e^G q E with P = q k^T * D, and the
chunk leaves (e^{G_C} - k_out^T W) E + k_out^T U (Yang et al. 2024, arXiv:2406.06484, section 3; with gates
arXiv:2412.06464). Documents decouple in the system, because D is 0 between them.

The keys' overlaps are computed and solved in fp32: rounded to 16 bits they are most of the error where keys are alike
and beta nears 2, for there a solution stays as large as its right side, token after token.
"""

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunked.carry import Chunks, carry
from torchlinearmoe.kernels.chunked.decay import compute_dtype
from torchlinearmoe.kernels.chunked.layout import Layout
from torchlinearmoe.kernels.chunked.scalar import scalar_decay
from torchlinearmoe.kernels.chunked.solve import solve_unit_lower


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    want_final: bool,
    layout: Layout,
) -> tuple[Tensor, Tensor | None]:
    """`reference.delta.delta_rule` for log_decay None or [B, T, HV]; q, k, v, beta as there."""
    dtype = compute_dtype(q)
    V = v.shape[-1]
    decay = scalar_decay(layout, log_decay, q.device, dtype)
    q_C, k_C, v_C = layout.split(q), layout.split(k), layout.split(v)
    groups = v_C.shape[1] // q_C.shape[1]
    if groups > 1:
        q_C, k_C = q_C.repeat_interleave(groups, 1), k_C.repeat_interleave(groups, 1)
    beta_C1 = layout.split(beta.to(dtype)).unsqueeze(-1)
    scores = decay.apply(torch.matmul(q_C, k_C.transpose(-1, -2)))
    k_wide = k_C.to(dtype)
    overlap = decay.apply(torch.matmul(k_wide * beta_C1, k_wide.transpose(-1, -2)))
    k_in = k_wide if decay.prefix is None else k_wide * decay.prefix
    right_side = torch.cat([v_C, k_in], -1) * beta_C1
    solved = solve_unit_lower(overlap, right_side)
    u, w = solved.split([V, k_C.shape[-1]], -1)
    u_low, w_low = u.to(q.dtype), w.to(q.dtype)
    q_in = q_C if decay.prefix is None else q_C * decay.prefix.to(q_C.dtype)
    chunks = Chunks(
        q_in=q_in - torch.matmul(scores, w_low),
        k_out=k_C if decay.suffix is None else k_C * decay.suffix.to(k_C.dtype),
        u=u_low,
        log_total=decay.log_total,
        w=w,
        prefix=None if layout.edges is None else decay.prefix,
    )
    entered, final = carry(layout, chunks, initial_state, want_final)
    return layout.join(layout.output(scores, u_low, entered, scale)), final
