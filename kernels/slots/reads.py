"""What queries read of slot keys, by the kernels of the linear recurrence.

Legend: T tokens, H heads, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunk_table import CHUNK
from torchlinearmoe.kernels.linear.per_channel import channel_kernels, operand
from torchlinearmoe.kernels.linear.walk import Stream, precision, strides, tile


def near_and_far(s: Tensor, c: Tensor, pairs: Tensor, far: Tensor, stream: Stream) -> Tensor:
    """What queries read of the slot keys of their own chunk, by pairs = q k^T, and of earlier ones: [T, H, S]."""
    (_, H, S), read, B = s.shape, torch.empty_like(far), tile(s.shape[2], 32)
    channel_kernels().channel_gradients[-(-S // B), stream.places, H](
        s, s, c, s, pairs, far, far, far, read, read, read, read, stream.start, stream.end, 1.0, *strides(s),
        *strides(s), H, S, C=CHUNK, B=B, BONUS=False, WANT_DK=False, WANT_DG=False, OPERAND=operand(s),
        PRECISION=precision(s), num_warps=4, num_stages=1,
    )  # fmt: skip
    return read
