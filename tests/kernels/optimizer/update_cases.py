"""One launch over several tensors beside the definition, one tensor at a time: on a GPU, or interpreted on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchlinearmoe.kernels.optimizer import definition
from torchlinearmoe.kernels.optimizer.definition import Place, Slot
from torchlinearmoe.kernels.optimizer.rounding import join_halves, split_halves
from torchlinearmoe.optim.gradients import for_launch, summed
from torchlinearmoe.optim.launches import Launch

SIZES = (1, 7, 2048, 2049, 8192, 20_000)
GROUP = {"lr": 0.03, "betas": (0.9, 0.95), "eps": 1e-8}


def make_slots(split: bool, state: torch.dtype, device: str, places: bool) -> list[Slot]:
    """Weights and moments of SIZES, equal on every call."""
    generator = torch.Generator().manual_seed(3)
    slots = []
    for number, size in enumerate(SIZES):
        master = torch.randn(size, generator=generator)
        weight, rest = split_halves(master) if split else (master, None)
        m, v = torch.randn(size, generator=generator), torch.rand(size, generator=generator)
        place = Place(2**33 + 5, 10, 30) if places and number % 2 else Place(17 * number)
        tensors = [x if x is None else x.to(device) for x in (weight, rest, m.to(state), v.to(state))]
        slots.append(Slot(*tensors, 0.1 * (number % 2), 12345 + number, place))  # pyright: ignore
    return slots


def masters(slots: list[Slot]) -> list[Tensor]:
    return [slot.weight if slot.rest is None else join_halves(slot.weight, slot.rest) for slot in slots]


def run(
    split: bool, grad: torch.dtype, earlier: torch.dtype | None, state: torch.dtype, places: bool, device: str
) -> dict[str, Any]:
    """Two updates and a skipped one; largest errors of masters and moments, and how many bits of moments differ."""
    generator = torch.Generator().manual_seed(4)
    grads = [[torch.randn(size, generator=generator).to(grad).to(device) for size in SIZES] for _ in range(3)]
    ours, expected = (make_slots(split, state, device, places) for _ in range(2))
    states = [
        {"step": torch.tensor(4.0, device=device), "exp_avg": slot.exp_avg, "exp_avg_sq": slot.exp_avg_sq}
        for slot in ours
    ]
    launch = Launch([(slot.weight, {"weight_decay": slot.weight_decay}) for slot in ours], states, ours)
    for number, (some, skipped) in enumerate(zip(grads, (0.0, 1.0, 0.0))):
        factor = torch.tensor(0.7, device=device)
        pairs = [(g, None if earlier is None else (2 * g.flip(0)).to(earlier)) for g in some]
        launch.run(pairs, GROUP, factor, torch.tensor(skipped, device=device))
        if skipped:
            continue
        step = torch.tensor(5.0 + number // 2, device=device)
        for slot, pair in zip(expected, pairs):
            definition.adamw(slot, summed(pair), step=step, factor=factor, **GROUP)
    assert all(state["step"].item() == 6 for state in states)
    return {
        "master": _error(masters(ours), masters(expected)),
        "exp_avg": _error([s.exp_avg for s in ours], [s.exp_avg for s in expected]),
        "exp_avg_sq": _error([s.exp_avg_sq for s in ours], [s.exp_avg_sq for s in expected]),
        "rounded otherwise": _differing([s.exp_avg for s in ours], [s.exp_avg for s in expected]),
    }


def norms_and_sums(device: str) -> tuple[float, ...]:
    """Relative errors of sums of squares in all types, and the largest of a sum of three gradients."""
    from torchlinearmoe.kernels.optimizer import triton
    from torchlinearmoe.kernels.optimizer.blocks import Blocks, addresses

    generator = torch.Generator().manual_seed(5)
    pieces = [torch.randn(size, generator=generator) for size in SIZES]
    errors, where, blocks = [], torch.device(device), Blocks(SIZES, torch.device(device))
    for dtype, earlier in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)):
        some = [(x.to(dtype).to(device), None if earlier is None else x.flip(0).to(device)) for x in pieces]
        expected = sum(summed(pair).double().square().sum() for pair in some)
        errors.append(abs(triton.square_sum(blocks, for_launch(some)).item() / float(expected) - 1))
    parts = [[torch.randn(size, generator=generator).bfloat16().to(device) for size in SIZES] for _ in range(3)]
    totals = [torch.full((size,), float("nan"), device=device) for size in SIZES]
    triton.add_gradients(blocks, addresses(totals, where), for_launch(list(zip(parts[1], parts[0]))))
    triton.add_gradients(blocks, addresses(totals, where), for_launch(list(zip(parts[2], totals))))
    sums = [a.float() + b.float() + c.float() for a, b, c in zip(*parts)]
    return *errors, max(float((total - found).abs().max()) for total, found in zip(totals, sums))  # pyright: ignore


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, expected))


def _differing(found: list[Tensor], expected: list[Tensor]) -> float:
    return sum(int((a != b).sum()) for a, b in zip(found, expected)) / sum(a.numel() for a in found)
