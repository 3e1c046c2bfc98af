"""What this machine's device can do, measured: the floors of a benchmark are counted in these."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchlinearmoe.benchmark.timing import time_steps

REPEATS = 12


@dataclass(frozen=True)
class Rates:
    """Of one device."""

    flops: float
    """FLOP/s of a large product: 8192^3 in bfloat16 on a GPU, 512^3 in float32 elsewhere."""
    bytes: float
    """Bytes a second of a large copy, those read and those written: 2 GiB on a GPU, 64 MiB elsewhere."""


def measure_rates(device: torch.device) -> Rates:
    """Both rates."""
    return Rates(_product(device), copy_rate(device))


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written."""
    size = 2**31 if device.type == "cuda" else 2**26
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / time_steps(lambda: target.copy_(source), steps=REPEATS, device=device)["step_s"]


def _product(device: torch.device) -> float:
    cuda = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if cuda else (512, torch.float32)
    a, b = torch.randn(2, size, size, device=device).to(dtype).unbind()
    out = torch.empty_like(a)
    return 2.0 * size**3 / time_steps(lambda: torch.mm(a, b, out=out), steps=REPEATS, device=device)["step_s"]
