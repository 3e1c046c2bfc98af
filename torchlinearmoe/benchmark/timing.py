"""Clocks for training steps: first step, steady pace, memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from torchlinearmoe.metrics.meter import peak_memory_gib


def time_steps(step: Callable[[], Any], *, steps: int, device: torch.device) -> dict[str, float]:
    """Seconds of the first step (compilation included), median seconds of the last half of `steps`, peak GiB."""
    started = time.perf_counter()
    step()
    _wait(device)
    first = time.perf_counter() - started
    seconds = []
    for _ in range(steps - 1):
        before = time.perf_counter()
        step()
        _wait(device)
        seconds.append(time.perf_counter() - before)
    return {
        "first_step_s": first,
        "step_s": statistics.median(seconds[len(seconds) // 2 :]),
        "memory_gib": peak_memory_gib(device),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
