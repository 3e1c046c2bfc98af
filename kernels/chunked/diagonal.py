"""Linear recurrences with a decay per channel (GLA, HGRN2, RWKV6)."""

from torch import Tensor

from torchlinearmoe.kernels.chunked.carry import Chunks, carry
from torchlinearmoe.kernels.chunked.channels import Reader, score_channels
from torchlinearmoe.kernels.chunked.decay import compute_dtype
from torchlinearmoe.kernels.chunked.layout import Layout


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
    own = None if bonus is None else ((q_C * k_C * bonus.to(dtype)[:, None, None]).sum(-1),)
    parts = score_channels(layout, [Reader(q_C, own)], [k_C], layout.split(log_decay.to(dtype)), v.dtype)
    ((scores,),), (q_in,), (k_out,) = parts.scores, parts.entered, parts.leaving
    chunks = Chunks(q_in.to(v.dtype), k_out.to(v.dtype), v_C, parts.log_total, None, parts.prefix)
    entered, final = carry(layout, chunks, initial_state, want_final)
    return layout.join(layout.output(scores, v_C, entered, scale)), final
