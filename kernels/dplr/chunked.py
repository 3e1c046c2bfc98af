"""Diagonal plus low rank transitions with a decay per channel (RWKV7, arXiv:2503.14456): chunks in WY form.

With the entering state E, the row that token t reads is
x_t = (a_t e^{G_(t-1)})^T E + sum_{s<t} (a_t^T diag(D_(t-1)s) b_s) x_s + (a_t^T diag(D_(t-1)s) k_s) v_s, a unit lower
triangular system whose solution is U + W E. Then o = (q b) X + (q k) v + (q e^G) E, and the chunk leaves
e^{G_C} E + b_out^T X + k_out^T v.
"""

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunked.carry import Chunks, carry
from torchlinearmoe.kernels.chunked.channels import Reader, score_channels
from torchlinearmoe.kernels.chunked.layout import CHUNK_SIZE, layout_of, prepare
from torchlinearmoe.kernels.chunked.solve import solve_unit_lower
from torchlinearmoe.kernels.operator import Backend
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
    """As `definition.dplr_rule`."""
    layout = layout_of(segments, CHUNK_SIZE, initial_state is not None or want_final)
    dtype, low = wide_type(q.dtype), q.dtype
    V, K = v.shape[-1], k.shape[-1]
    q_C, k_C, a_C, b_C, log_C = (layout.split(x.to(dtype)) for x in (q, k, a, b, log_decay))
    v_C = layout.split(v)
    nothing = torch.zeros_like(a_C[..., 0])
    parts = score_channels(layout, [Reader(q_C), Reader(a_C, (nothing, nothing))], [b_C, k_C], log_C, low)
    (qb, qk), (ab, ak) = parts.scores
    (q_in, a_in), (b_out, k_out) = parts.entered, parts.leaving
    read = torch.matmul(ak, v_C).to(dtype)
    u, w = solve_unit_lower(-ab.to(dtype), torch.cat([read, a_in], -1)).split([V, K], -1)
    u_low = u.to(low)
    chunks = Chunks(
        q_in=q_in.to(low) + torch.matmul(qb, w.to(low)),
        k_out=k_out.to(low),
        u=v_C,
        log_total=parts.log_total,
        w=-w,
        prefix=parts.prefix,
        b_out=b_out.to(low),
        x=u_low,
    )
    entered, final = carry(layout, chunks, initial_state, want_final)
    return layout.join(layout.output(qk, v_C, entered + torch.matmul(qb, u_low), scale)), final


BACKEND = Backend("torch", dplr_rule, ("dplr",), order=0, fused=True, prepare=prepare(CHUNK_SIZE))
