"""cuDNN where every row is one document, keys and values each of their own width; other rows as `varlen` has them.

cuDNN's kernels over borders are not called: torch 2.11 gives their backward a head's width for the longest document's
length, and it writes beyond its memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchlinearmoe.kernels.attention import varlen
from torchlinearmoe.kernels.attention.rows import QueryRows, by_rows
from torchlinearmoe.kernels.operator import Backend, Call


def attend(q: Tensor, k: Tensor, v: Tensor, rows: QueryRows, scale: float, window: int) -> Tensor:
    """As `packed_attention`; k and v have the keys of `rows`."""
    if not rows.plain_rows:
        return varlen.attend(q, k, v, rows, scale, window)
    grouped, value_width = k.shape[1] != q.shape[1], v.shape[-1]
    # Widths are multiples of 8. Channels of zeros change no score and come back as zeros.
    q, k, v = (F.pad(x, (0, -x.shape[-1] % 8)) for x in (q, k, v))

    def of_rows(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return by_rows(of_rows, q, k, v, rows)[..., :value_width]


def refuse(call: Call) -> str | None:
    """Heads that one of the two ways does not take."""
    return "it takes heads of at most 192 channels" if call.channels > 192 else None


BACKEND = Backend(
    "cudnn",
    attend,
    kinds=("packed",),
    dtypes=frozenset((torch.bfloat16, torch.float16)),
    devices=frozenset(("cuda",)),
    kept=("aten::_scaled_dot_product_cudnn_attention", *varlen.BACKEND.kept),
    exact=False,  # its sums over keys come in any order
    refuses=refuse,
)
