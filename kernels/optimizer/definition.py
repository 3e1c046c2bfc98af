"""AdamW on one tensor, in PyTorch: what every faster form must equal.

    m' = m + (1 - beta1) (g - m)        v' = beta2 v + (1 - beta2) g^2        g: the gradient times the clip factor
    w' = w (1 - lr decay) - lr m'_hat / (sqrt(v'_hat) + eps)                  x_hat: x over 1 - beta^step

Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlinearmoe.kernels.optimizer.rounding import join_halves, random_bits, round_by_chance, split_halves

ELEMENTS = 2**24
"""Worked on at a time, so that what is held beside the tensors stays small."""


@dataclass(frozen=True)
class Place:
    """Where a local tensor lies in the whole one: element i is number
    `base + (i // inner) * stride + i % inner` of it; inner 0 says that the tensor is a contiguous piece."""

    base: int = 0
    inner: int = 0
    stride: int = 0

    def index(self, start: int, count: int, device: torch.device) -> Tensor:
        """int64 [count]: global places of the elements from `start` on."""
        local = torch.arange(start, start + count, device=device)
        if not self.inner:
            return self.base + local
        return self.base + local // self.inner * self.stride + local % self.inner


@dataclass(frozen=True)
class Slot:
    """What belongs to one parameter. Tensors are local, contiguous and of one shape."""

    weight: Tensor
    """float32 or float64, or bfloat16 with its `rest`."""
    rest: Tensor | None
    """int16, see `halves`; None where the weight is its own master."""
    exp_avg: Tensor
    exp_avg_sq: Tensor
    """The moments: float32 (float64 beside a float64 weight) or bfloat16, rounded by chance."""
    weight_decay: float
    key: int = 0
    place: Place = Place()


@torch.no_grad()
def adamw(
    slot: Slot,
    grad: Tensor,
    *,
    step: Tensor,
    lr: float,
    betas: Sequence[float],
    eps: float,
    factor: Tensor,
) -> None:
    """Update one parameter and its moments in place.

    grad: of any floating type; step: 0-dim, this update's number from 1; factor: 0-dim, multiplies the gradient.
    """
    flat = [None if x is None else x.view(-1) for x in (slot.weight, slot.rest, slot.exp_avg, slot.exp_avg_sq, grad)]
    for start in range(0, slot.weight.numel(), ELEMENTS):
        weight, rest, exp_avg, exp_avg_sq, g = (None if x is None else x[start : start + ELEMENTS] for x in flat)
        assert weight is not None and exp_avg is not None and exp_avg_sq is not None and g is not None
        wide = torch.promote_types(weight.dtype, torch.float32)
        g = g.to(wide) * factor.to(wide)
        w = weight if rest is None else join_halves(weight, rest)
        m, v = exp_avg.to(wide), exp_avg_sq.to(wide)
        m = m + (1 - betas[0]) * (g - m)
        v = betas[1] * v + (1 - betas[1]) * g * g
        corrections = [(1 - torch.as_tensor(beta, dtype=torch.float64) ** step.double()).to(wide) for beta in betas]
        w = w * (1 - lr * slot.weight_decay)
        w = w - (lr / corrections[0]) * m / (v.sqrt() / corrections[1].sqrt() + eps)
        if rest is None:
            weight.copy_(w)
        else:
            upper, lower = split_halves(w)
            weight.copy_(upper)
            rest.copy_(lower)
        if exp_avg.dtype == torch.bfloat16:
            bits = random_bits(slot.key, step, slot.place.index(start, w.numel(), w.device))
            exp_avg.copy_(round_by_chance(m, bits & 0xFFFF))
            exp_avg_sq.copy_(round_by_chance(v, bits >> 16))
        else:
            exp_avg.copy_(m)
            exp_avg_sq.copy_(v)
