"""float32 in bfloat16: by chance, or exactly as two halves.

Moments are rounded up with the probability of the part that is cut off, so that the mean stays: one that changes by
less than half a bfloat16 step would never change if it were rounded to the nearest. The chance is no generator's state
but a hash of (key of the tensor, step, global place of the element): a resumed run and any layout of the ranks draw the
same bits.

Hash: PCG-RXS-M-XS as in Jarzynski and Olano 2020, "Hash Functions for GPU Rendering", JCGT 9(3), in 32 bits.

The halves of a master are the bfloat16 weight that computes, and the 16 bits that it lacks. The weight is the master
rounded to the nearest bfloat16 (ties away from zero), the rest a signed difference, so that both together take 4 bytes
and give the master back exactly:

    bits of the master   3f80 c000      1.005859375
    weight               3f81           1.0078125, rounded up
    rest                      c000      -16384: (0x3f81 << 16) - 16384 == 0x3f80c000

Near to it: Zamirai et al. 2020, arXiv 2010.06192, who keep 16-bit weights with a 16-bit compensation; here it is exact.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
STEP_FACTOR = 0x9E3779B9
HIGH_FACTOR = 0x85EBCA6B


def tensor_key(seed: int, name: str) -> int:
    """32 bits that tell the parameter `name` of a run from all others."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest(), "little")


def random_bits(key: int, step: Tensor, index: Tensor) -> Tensor:
    """32 random bits an element, as int64 in [0, 2^32).

    step: integer-valued, 0-dim, what the optimizer counts; index: int64, the elements' places in the whole tensor.
    """
    start = _pcg((key + (step.to(torch.int64) & MASK) * STEP_FACTOR) & MASK)
    return _pcg((start + (index & MASK) + (index >> 32) * HIGH_FACTOR) & MASK)


def round_by_chance(x: Tensor, bits: Tensor) -> Tensor:
    """float32 -> bfloat16, rounded up where `bits`, integers in [0, 2^16), carry over."""
    whole = x.contiguous().view(torch.int32) + bits.to(torch.int32)
    return (whole >> 16).to(torch.int16).view(torch.bfloat16)


def _pcg(x: Tensor) -> Tensor:
    """int64 in [0, 2^32) -> the same."""
    state = (x * 747796405 + 2891336453) & MASK
    word = (((state >> ((state >> 28) + 4)) ^ state) * 277803737) & MASK
    return (word >> 22) ^ word


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
