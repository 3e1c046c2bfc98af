"""What the contestants of `benchmark optimizer` share: the clock, and the definition that their updates are held to.

A part moves a known number of bytes; its share is that of the rate of a large copy, measured in the same process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchlinearmoe.benchmark.rates import copy_rate
from torchlinearmoe.benchmark.timing import time_steps
from torchlinearmoe.kernels.optimizer import definition
from torchlinearmoe.kernels.optimizer.definition import Place, Slot
from torchlinearmoe.kernels.optimizer.rounding import join_halves

SLICE = 5000
"""Elements of a tensor that are checked."""
WEIGHTS, GRADIENTS = 0.02, 1e-3
"""Bounds of the random values."""
LR, BETAS, EPS, DECAY, CLIP_NORM = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0


class Parts:
    """Rows of a contestant."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.copy = copy_rate(device)
        self.rows: list[dict[str, Any]] = []

    def time(self, part: str, run: Callable[[], Any], moved: float) -> None:
        """Time `run`, which moves so many bytes."""
        seconds = time_steps(run, steps=self.repeats, device=self.device)["step_s"]
        rate = moved / seconds
        self.rows.append({"part": part, "ms": seconds * 1e3, "GB/s": rate / 1e9, "share of copy": rate / self.copy})


@dataclass(frozen=True)
class Expected:
    """A slice of a parameter after an update by the definition, and the tensors that another form updates."""

    slot: Slot
    slice: Slot

    @classmethod
    def of(cls, slot: Slot, grad: Tensor, step: Tensor, factor: Tensor) -> Expected:
        """Taken before the update; step: this update's number."""
        size = slot.weight.numel()
        start = max(0, size // 2 - SLICE // 2)

        def cut(tensor: Tensor) -> Tensor:
            return tensor.reshape(-1)[start : start + SLICE].clone()

        rest = None if slot.rest is None else cut(slot.rest)
        part = Slot(
            cut(slot.weight),
            rest,
            cut(slot.exp_avg),
            cut(slot.exp_avg_sq),
            slot.weight_decay,
            slot.key,
            Place(start),
        )
        definition.adamw(part, cut(grad), step=step, lr=LR, betas=BETAS, eps=EPS, factor=factor)
        return cls(slot, part)

    def check(self, *, weights: float, moments: float) -> None:
        """Raise AssertionError unless the update gave the same, to these relative errors."""
        start, count = self.slice.place.base, self.slice.weight.numel()

        def now(tensor: Tensor) -> Tensor:
            return tensor.reshape(-1)[start : start + count]

        rest = None if self.slot.rest is None else now(self.slot.rest)
        _close(_master(now(self.slot.weight), rest), _master(self.slice.weight, self.slice.rest), weights)
        _close(now(self.slot.exp_avg), self.slice.exp_avg, moments)
        _close(now(self.slot.exp_avg_sq), self.slice.exp_avg_sq, moments)


def chosen(parameters: Sequence[Tensor]) -> list[int]:
    """Which parameters are checked: the smallest, the largest, and one of each type."""
    order = sorted(range(len(parameters)), key=lambda i: parameters[i].numel())
    by_type = {parameters[i].dtype: i for i in order}
    return list(dict.fromkeys([order[0], order[-1], *by_type.values()]))


def _master(weight: Tensor, rest: Tensor | None) -> Tensor:
    return weight if rest is None else join_halves(weight, rest)


def _close(found: Tensor, wanted: Tensor, error: float) -> None:
    """Relative to the largest: a hundredth of a step of the learning rate is seen in weights of WEIGHTS."""
    scale = wanted.float().abs().max().item()
    torch.testing.assert_close(found.float(), wanted.float(), rtol=error, atol=error * scale)
