"""Where a step goes: a few consecutive steps under torch.profiler, by category, beside the floor of each.

On a GPU they are profiled twice: with the device alone, which tells busy time and launches, and with the host's events
too, which tell what each kernel is for. Both slow the host down, and a device that waits for it would look idle: idle
is what the step, timed before without labels and profiler, takes beyond the busy time. Steps follow each other as in
training, nobody waits in between. Kernels that overlap each count whole.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from torchlinearmoe.benchmark.categories import CATEGORIES, categorise
from torchlinearmoe.benchmark.contest import show
from torchlinearmoe.benchmark.floors import Work
from torchlinearmoe.benchmark.rates import measure_rates
from torchlinearmoe.benchmark.trace import Piece, busy, device_pieces, host_pieces, load_events

STEPS = 3
WARM_UP = 2
"""Steps before, in which compiled code may notice the labels."""


def profile_steps(
    step: Callable[[], Any], device: torch.device, work: Mapping[str, Work], step_s: float
) -> dict[str, Any]:
    """Figures of a step, milliseconds unless said; `work` of a step by category, `step_s` its seconds as timed."""
    for _ in range(WARM_UP):
        step()
    host_ms = _host_ms(step, device)
    cuda = device.type == "cuda"
    pieces = _record(step, device, [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])])
    undisturbed = _record(step, device, [ProfilerActivity.CUDA]) if cuda else pieces
    rates = measure_rates(device)
    own, launches, unlabelled = tally(pieces)
    busy_ms = busy(undisturbed) / 1e3 / STEPS
    # Events of a CPU are those of a host that the profiler slows down: only their own span holds them.
    span = (max(p.end for p in undisturbed) - min(p.start for p in undisturbed)) / 1e3 / STEPS
    step_ms = max(step_s * 1e3, busy_ms) if cuda else span
    rows = []
    for name in CATEGORIES:
        floor = work[name].seconds(rates) * 1e3 if name in work else None
        ms = own[name] / 1e3 / STEPS
        rows.append(
            {
                "category": name,
                "ms": ms,
                "share of step": ms / step_ms,
                "launches": launches[name] / STEPS,
                "floor ms": floor,
                "share of floor": floor / ms if floor is not None and ms else None,
            }
        )
    rows.append({"category": "idle", "ms": step_ms - busy_ms, "share of step": 1 - busy_ms / step_ms})
    return {
        "rows": rows,
        "step_ms": step_ms,
        "busy_ms": busy_ms,
        "host_ms": host_ms,
        "launches": len(undisturbed) / STEPS,
        "unlabelled_ms": unlabelled / 1e3 / STEPS,
        "matmul_tflops": rates.flops / 1e12,
        "copy_gb_s": rates.bytes / 1e9,
    }


def tally(pieces: Sequence[Piece]) -> tuple[Counter[str], Counter[str], float]:
    """Microseconds and number of pieces by category; and microseconds of "other" under no label at all."""
    own: Counter[str] = Counter()
    number: Counter[str] = Counter()
    unlabelled = 0.0
    for piece in pieces:
        category = categorise(piece.name, piece.around, piece.label)
        own[category] += piece.own  # pyright: ignore[reportArgumentType]
        number[category] += 1
        if category == "other" and piece.label is None:
            unlabelled += piece.own
    return own, number, unlabelled


def show_profile(title: str, figures: Mapping[str, Any]) -> None:
    """Print what `profile_steps` found."""
    show(title, figures["rows"])
    print(
        f"a step: {figures['step_ms']:.1f} ms, the device busy for {figures['busy_ms']:.1f} ms, "
        f"{figures['launches']:.0f} launches; the host takes {figures['host_ms']:.1f} ms for one alone; "
        f"of other, {figures['unlabelled_ms']:.2f} ms under no label\n"
        f"floors at {figures['matmul_tflops']:.3g} TFLOP/s and {figures['copy_gb_s']:.4g} GB/s, measured in this run",
        flush=True,
    )


def _record(step: Callable[[], Any], device: torch.device, activities: list[ProfilerActivity]) -> list[Piece]:
    _wait(device)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
        _wait(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = load_events(path)
    return device_pieces(events) if device.type == "cuda" else host_pieces(events)


def _host_ms(step: Callable[[], Any], device: torch.device) -> float:
    """Until the host is through with a step that finds the device idle; median."""
    times = []
    for _ in range(STEPS):
        _wait(device)
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
