"""Contestant: one backend of one operator."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import Tensor

from torchlinearmoe.benchmark.contest import answer
from torchlinearmoe.benchmark.kernel_calls import Timed, timed_call
from torchlinearmoe.benchmark.rates import measure_rates
from torchlinearmoe.benchmark.timing import time_steps

CHECKED = (1, 63, 64, 72)
"""Tokens of the documents on which a backend is held to the definition before it is timed."""


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Figures of `options`: operator, kind, backend, compile, lengths, heads, width, repeats."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    sizes = (options["heads"], options["width"], device, dtype)
    error = _error(timed_call(options["operator"], options["kind"], CHECKED, *sizes), options["backend"])
    if error > (3e-2 if dtype == torch.bfloat16 else 1e-3):
        return {"error": f"output off by {error:.1e} from the definition"}
    call = timed_call(options["operator"], options["kind"], tuple(options["lengths"]), *sizes)
    function = torch.compile(call.run) if options["compile"] else call.run
    started = time.perf_counter()
    out = function(options["backend"])
    gradient = torch.randn_like(out.detach())
    out.backward(gradient)
    _wait(out)
    warm = time.perf_counter() - started
    whole = time_steps(
        lambda: _both(function, call, gradient, options["backend"]), steps=options["repeats"], device=device
    )
    with torch.no_grad():
        forward = time_steps(lambda: function(options["backend"]), steps=options["repeats"], device=device)
    rates = measure_rates(device)
    budget = call.budget
    floor = max(budget.training_flops / rates.flops, (budget.forward_bytes + budget.backward_bytes) / rates.bytes)
    return {
        "forward_ms": forward["step_s"] * 1e3,
        "ms": whole["step_s"] * 1e3,
        "floor_ms": floor * 1e3,
        "of_floor": floor / whole["step_s"],
        "first_call_s": warm,
        "memory_gib": whole["memory_gib"],
        "difference": error,
    }


def _both(function: Any, call: Timed, gradient: Tensor, backend: str) -> Tensor:
    for x in call.inputs.values():
        x.grad = None
    out = function(backend)
    out.backward(gradient)
    return out


def _error(call: Timed, backend: str) -> float:
    found, expected = (call.run(name).detach().double() for name in (backend, "reference"))
    return float((found - expected).norm() / expected.norm())


def _wait(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


if __name__ == "__main__":
    answer(measure(json.loads(sys.argv[1])))
