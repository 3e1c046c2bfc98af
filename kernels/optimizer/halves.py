"""A float32 master as two halves: the bfloat16 weight that computes, and the 16 bits that it lacks.

The weight is the master rounded to the nearest bfloat16 (ties away from zero), the rest a signed difference, so that
both together take 4 bytes and give the master back exactly:

    bits of the master   3f80 c000      1.005859375
    weight               3f81           1.0078125, rounded up
    rest                      c000      -16384: (0x3f81 << 16) - 16384 == 0x3f80c000

Near to it: Zamirai et al. 2020, arXiv 2010.06192, who keep 16-bit weights with a 16-bit compensation; here it is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split_halves(master: Tensor) -> tuple[Tensor, Tensor]:
    """float32 of any shape -> (bfloat16 weight, int16 rest) of the same shape."""
    bits = master.contiguous().view(torch.int32)
    upper = (bits + 0x8000) >> 16
    rest = bits - (upper << 16)
    return upper.to(torch.int16).view(torch.bfloat16), rest.to(torch.int16)


def join_halves(weight: Tensor, rest: Tensor) -> Tensor:
    """The float32 master of (bfloat16 weight, int16 rest)."""
    bits = (weight.contiguous().view(torch.int16).to(torch.int32) << 16) + rest.to(torch.int32)
    return bits.view(torch.float32)
