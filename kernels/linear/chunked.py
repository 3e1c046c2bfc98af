"""The linear recurrence in chunks.

With at most one decay a head this is masked attention without softmax inside a chunk, (q k^T * D) v with D[t, s] the
decay from s to t (Mamba2's state space duality, Dao and Gu 2024, arXiv:2405.21060). With a decay per channel (GLA,
HGRN2, RWKV6) the decays are inside the scores.
"""

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunked.carry import Chunks, carry
from torchlinearmoe.kernels.chunked.channels import Reader, score_channels
from torchlinearmoe.kernels.chunked.layout import CHUNK_SIZE, Layout, layout_of, prepare
from torchlinearmoe.kernels.chunked.scalar_decay import scalar_decay
from torchlinearmoe.kernels.linear.kinds import KINDS
from torchlinearmoe.kernels.operator import Backend
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
    """As `definition.linear_recurrence`."""
    layout = layout_of(segments, CHUNK_SIZE, initial_state is not None or want_final)
    v_C = layout.split(v)
    if log_decay is not None and log_decay.dim() == 3:
        scores, chunks = per_channel(q, k, v_C, log_decay, bonus, layout)
    else:
        scores, chunks = per_head(q, k, v_C, log_decay, layout)
    entered, final = carry(layout, chunks, initial_state, want_final)
    return layout.join(layout.output(scores, v_C, entered, scale)), final


def per_head(q: Tensor, k: Tensor, v_C: Tensor, log_decay: Tensor | None, layout: Layout) -> tuple[Tensor, Chunks]:
    """Scores and effective queries and keys for log_decay None, [H] or [T, H]."""
    decay = scalar_decay(layout, log_decay, q.device, wide_type(q.dtype))
    q_C, k_C = layout.split(q), layout.split(k)
    scores = decay.apply(torch.matmul(q_C, k_C.transpose(-1, -2)))
    q_in = q_C if decay.prefix is None else q_C * decay.prefix.to(q_C.dtype)
    k_out = k_C if decay.suffix is None else k_C * decay.suffix.to(k_C.dtype)
    prefix = None if layout.edges is None else decay.prefix
    return scores, Chunks(q_in, k_out, v_C, decay.log_total, None, prefix)


def per_channel(
    q: Tensor, k: Tensor, v_C: Tensor, log_decay: Tensor, bonus: Tensor | None, layout: Layout
) -> tuple[Tensor, Chunks]:
    """The same for log_decay [T, H, K]."""
    dtype = wide_type(q.dtype)
    q_C, k_C = layout.split(q.to(dtype)), layout.split(k.to(dtype))
    own = None if bonus is None else ((q_C * k_C * bonus.to(dtype)[:, None, None]).sum(-1),)
    parts = score_channels(layout, [Reader(q_C, own)], [k_C], layout.split(log_decay.to(dtype)), v_C.dtype)
    ((scores,),), (q_in,), (k_out,) = parts.scores, parts.entered, parts.leaving
    return scores, Chunks(q_in.to(v_C.dtype), k_out.to(v_C.dtype), v_C, parts.log_total, None, parts.prefix)


BACKEND = Backend("torch", linear_recurrence, KINDS, order=0, fused=True, prepare=prepare(CHUNK_SIZE))
