"""Contestant: torch's fused AdamW, on bfloat16 weights alone or on float32 masters that are copied to bfloat16 weights.

Gradients come in bfloat16 from one micro-batch; masters take them in float32, cast within the update. Without masters
those of several micro-batches are summed in bfloat16.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchlinearmoe.benchmark.contest import answer
from torchlinearmoe.benchmark.update_parts import (
    BETAS,
    CLIP_NORM,
    DECAY,
    EPS,
    GRADIENTS,
    LR,
    WEIGHTS,
    Expected,
    Parts,
    chosen,
)
from torchlinearmoe.kernels.optimizer.definition import Slot
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.optim import parameter_groups
from torchlinearmoe.recipe import load_recipe


@torch.no_grad()
def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Rows of `options`: recipe, overrides, masters, repeats."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    masters = options["masters"]
    dtype = torch.float32 if masters else torch.bfloat16
    with torch.device("meta"):
        shapes = Decoder(load_recipe(options["recipe"], options["overrides"]).model)
    groups = parameter_groups(shapes, DECAY)
    for group in groups:
        group["params"] = [_random(p, dtype, device, WEIGHTS) for p in group["params"]]
    parameters: list[Tensor] = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)
    gradients = [_random(p, dtype, device) for p in parameters]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    halves = [_random(p, torch.bfloat16, device) for p in parameters]
    weights = [p.bfloat16() for p in parameters] if masters else []

    def update() -> None:
        optimizer.step()
        if masters:
            torch._foreach_copy_(weights, parameters)

    def cast() -> None:
        torch._foreach_copy_(gradients, halves)

    def norm() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)

    def add() -> None:
        for total, grad in zip(gradients, halves):
            total.add_(grad)

    _check(optimizer, update)
    assert all(torch.equal(weight, parameter.bfloat16()) for weight, parameter in zip(weights, parameters))
    count, size = sum(p.numel() for p in parameters), dtype.itemsize
    parts = Parts(device, options["repeats"])
    norm_bytes, update_bytes = 3 * size * count, (size + 2 * 3 * size + (4 + 2 if masters else 0)) * count
    half = "bfloat16 gradients (one micro-batch)"
    if masters:
        parts.time(f"update, {half}", _one_after_the_other(cast, update), (2 + 4) * count + update_bytes)
        whole = _one_after_the_other(cast, norm, update)
        parts.time(f"norm, clip and update, {half}", whole, (2 + 4) * count + norm_bytes + update_bytes)
    gradient = "float32 gradients (several)" if masters else half
    parts.time(f"norm and clip, {gradient}", norm, norm_bytes)
    parts.time(f"update, {gradient}", update, update_bytes)
    parts.time(f"norm, clip and update, {gradient}", _one_after_the_other(norm, update), norm_bytes + update_bytes)
    parts.time("sum of gradients, a further micro-batch", add, (2 * size + 2) * count)
    return {"rows": parts.rows, "parameters": count / 1e9}


def _random(shape: Tensor, dtype: torch.dtype, device: torch.device, bound: float = GRADIENTS) -> Tensor:
    return torch.empty(shape.shape, dtype=dtype, device=device).uniform_(-bound, bound)


def _one_after_the_other(*functions: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        for function in functions:
            function()

    return run


def _check(optimizer: torch.optim.AdamW, update: Callable[[], None]) -> None:
    """The second update, held to the definition."""
    update()
    members = [(p, group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    expected = []
    for index in chosen([parameter for parameter, _ in members]):
        parameter, decay = members[index]
        state = optimizer.state[parameter]
        slot = Slot(parameter, None, state["exp_avg"], state["exp_avg_sq"], decay)
        step = state["step"].to(parameter.device) + 1
        expected.append(Expected.of(slot, parameter.grad, step, torch.ones((), device=parameter.device)))
    update()
    for one in expected:
        error = 1e-2 if one.slot.weight.dtype == torch.bfloat16 else 1e-5
        one.check(weights=error, moments=error)


if __name__ == "__main__":
    answer(measure(json.loads(sys.argv[1])))
