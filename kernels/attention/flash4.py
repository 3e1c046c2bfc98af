"""FlashAttention-4, a package of kernels in CuTe: Hopper and Blackwell, over borders, values of their own width."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinearmoe.kernels.attention.flash3 import KINDS, other_gpus, refuse
from torchlinearmoe.kernels.attention.rows import QueryRows
from torchlinearmoe.kernels.operator import Backend, outside_graphs


@outside_graphs
def attend(q: Tensor, k: Tensor, v: Tensor, rows: QueryRows, scale: float, window: int) -> Tensor:
    """As `packed_attention`; k and v have the keys of `rows`."""
    # Widths are multiples of 8. Channels of zeros change no score and come back as zeros.
    padded = (F.pad(x, (0, -x.shape[-1] % 8)) for x in (q, k, v))
    o = importlib.import_module("flash_attn.cute").flash_attn_varlen_func(
        *padded,
        cu_seqlens_q=rows.borders[0],
        cu_seqlens_k=rows.borders[1],
        max_seqlen_q=rows.longest[0],
        max_seqlen_k=rows.longest[1],
        softmax_scale=scale,
        causal=True,
        window_size=(window - 1, 0) if window else (None, None),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return (o[0] if isinstance(o, tuple) else o)[..., : v.shape[-1]]


BACKEND = Backend(
    "flash4",
    attend,
    kinds=KINDS,
    dtypes=frozenset((torch.bfloat16, torch.float16)),
    devices=frozenset(("cuda",)),
    needs=("flash_attn.cute",),
    install="pip install --pre flash-attn-4",
    refuses=refuse,
    defects=(other_gpus((0, 0), (9, 0)),),
)
