"""Contestant: this project's AdamW over bfloat16 weights with float32 masters, the moments float32 or bfloat16."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor, nn

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
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.optim import build_optimizer, step_if_finite
from torchlinearmoe.optim.adamw import AdamW
from torchlinearmoe.optim.masters import hold_masters, rest_of
from torchlinearmoe.optim.sums import add_parts
from torchlinearmoe.parallel.clip import gradient_norm
from torchlinearmoe.recipe import load_recipe


@torch.no_grad()
def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Rows of `options`: recipe, overrides, states, repeats."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Decoder(load_recipe(options["recipe"], options["overrides"]).model)
    model.to_empty(device=device)
    for parameter in model.parameters():
        parameter.uniform_(-WEIGHTS, WEIGHTS)
    hold_masters(model, torch.bfloat16)
    optimizer = build_optimizer(model, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, states=options["states"])
    parts = Parts(device, options["repeats"])
    factor, skipped = torch.ones((), device=device), torch.zeros((), device=device)

    def norm() -> Tensor:
        return gradient_norm(model)

    def update() -> None:
        optimizer.update(factor, skipped)

    def both() -> None:
        step_if_finite(optimizer, norm(), CLIP_NORM)

    for name, dtype, note in (("bfloat16", torch.bfloat16, "one micro-batch"), ("float32", torch.float32, "several")):
        for parameter in model.parameters():
            parameter.grad = None
            parameter.grad = _gradient(parameter, dtype if rest_of(parameter) is not None else parameter.dtype)
        _check(model, optimizer)
        norm_bytes, update_bytes = _bytes(optimizer)
        gradients = f"{name} gradients ({note})"
        parts.time(f"norm, {gradients}", norm, norm_bytes)
        parts.time(f"update, {gradients}", update, update_bytes)
        parts.time(f"norm, clip and update, {gradients}", both, norm_bytes + update_bytes)
    _time_sums(model, parts)
    return {"rows": parts.rows, "parameters": sum(p.numel() for p in model.parameters()) / 1e9}


def _gradient(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(parameter, dtype=dtype).uniform_(-GRADIENTS, GRADIENTS)


def _check(model: nn.Module, optimizer: AdamW) -> None:
    """One update, held to the definition."""
    device = next(model.parameters()).device
    factor, skipped = torch.full((), 0.5, device=device), torch.zeros((), device=device)
    members = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    expected = []
    for index in chosen([parameter for parameter, _ in members]):
        parameter, group = members[index]
        assert parameter.grad is not None
        slot = optimizer.slot(parameter, group)
        step = optimizer.state[parameter]["step"] + 1
        expected.append(Expected.of(slot, parameter.grad, step, factor))
    optimizer.update(factor, skipped)
    for one in expected:
        one.check(weights=1e-5, moments=1e-2 if one.slot.exp_avg.dtype == torch.bfloat16 else 1e-5)


def _bytes(optimizer: AdamW) -> tuple[float, float]:
    """Bytes that the norm and the update move."""
    norm = update = 0.0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            slot = optimizer.slot(parameter, group)
            held = (slot.weight, slot.rest, slot.exp_avg, slot.exp_avg_sq)
            assert parameter.grad is not None
            read = parameter.numel() * parameter.grad.element_size()
            norm += read
            update += read + 2 * parameter.numel() * sum(x.element_size() for x in held if x is not None)
    return norm, update


def _time_sums(model: nn.Module, parts: Parts) -> None:
    """Another micro-batch's bfloat16 gradients into the float32 sums."""
    parameters = [p for p in model.parameters() if rest_of(p) is not None]
    totals = [p.grad for p in parameters if p.grad is not None]
    pairs = [(_gradient(p, torch.bfloat16), total) for p, total in zip(parameters, totals, strict=True)]
    moved = sum(total.numel() * (4 + 4 + 2) for total in totals)
    parts.time("sum of gradients, a further micro-batch", lambda: add_parts(totals, pairs), moved)


if __name__ == "__main__":
    answer(measure(json.loads(sys.argv[1])))
