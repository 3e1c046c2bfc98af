"""Clocks for training steps: first step, steady pace, memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from torchlinearmoe.metrics.meter import peak_memory_gib


def time_steps(step: Callable[[], Any], *, steps: int, device: torch.device) -> dict[str, float]:
    """Seconds of the first step (compilation included), median seconds of the last half of `steps`, peak GiB.

    On a GPU steps follow each other as they do in training: events mark their ends, and nobody waits in between.
    """
    started = time.perf_counter()
    step()
    _wait(device)
    first = time.perf_counter() - started
    marks = [_mark(device)]
    for _ in range(steps - 1):
        step()
        marks.append(_mark(device))
    _wait(device)
    seconds = [_between(before, after) for before, after in pairwise(marks)]
    return {
        "first_step_s": first,
        "step_s": statistics.median(seconds[len(seconds) // 2 :]),
        "memory_gib": peak_memory_gib(device),
    }


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(before: Any, after: Any) -> float:
    """Seconds."""
    return after - before if isinstance(after, float) else before.elapsed_time(after) / 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
