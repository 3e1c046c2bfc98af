"""Contestant: one way to compute a part of a step."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import Tensor

from torchlinearmoe.benchmark.contest import answer
from torchlinearmoe.benchmark.parts import Part, part_module
from torchlinearmoe.benchmark.rates import measure_rates
from torchlinearmoe.benchmark.timing import time_steps
from torchlinearmoe.recipe import load_recipe

CHECKED = (32, 32)
"""Tokens of the documents on which output and gradients are held to the definition."""


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Figures of `options`: part, contestant, recipe, overrides, lengths, compile, repeats."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    module = part_module(options["part"])
    model = load_recipe(options["recipe"], options["overrides"]).model

    def draw(contestant: str, lengths: tuple[int, ...]) -> Part:
        torch.manual_seed(0)
        return module.part(model, lengths, contestant, options["compile"], device, dtype)

    found, expected = (_results(draw(name, CHECKED)) for name in (options["contestant"], "reference"))
    error = max(float((x - y).norm() / y.norm().clamp(min=1e-30)) for x, y in zip(found, expected, strict=True))
    if not error < (5e-2 if dtype == torch.bfloat16 else 1e-3):
        return {"error": f"off by {error:.1e} from the definition"}
    part = draw(options["contestant"], tuple(options["lengths"]))
    gradient = torch.ones_like(part.run(*part.inputs).detach())
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    started = time.perf_counter()
    _both(part, gradient)
    first = time.perf_counter() - started
    whole = time_steps(lambda: _both(part, gradient), steps=options["repeats"], device=device)
    with torch.no_grad():
        forward = time_steps(lambda: part.run(*part.inputs), steps=options["repeats"], device=device)
    rates, budget = measure_rates(device), part.budget
    floor = max(budget.training_flops / rates.flops, (budget.forward_bytes + budget.backward_bytes) / rates.bytes)
    return {
        "forward_ms": forward["step_s"] * 1e3,
        "ms": whole["step_s"] * 1e3,
        "floor_ms": floor * 1e3,
        "of_floor": floor / whole["step_s"],
        "tflops": budget.training_flops / whole["step_s"] / 1e12,
        "extra_gib": whole["memory_gib"] - held / 2**30,
        "first_call_s": first,
        "difference": error,
    }


def _both(part: Part, gradient: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(part.run(*part.inputs), part.inputs, gradient)


def _results(part: Part) -> list[Tensor]:
    out = part.run(*part.inputs)
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, part.inputs, torch.ones_like(out)))]


if __name__ == "__main__":
    answer(measure(json.loads(sys.argv[1])))
