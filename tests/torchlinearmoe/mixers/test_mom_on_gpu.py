"""Mixture of memories on a GPU: as on the CPU, and never stopping for the host while it trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixer_cases import Case, make_stack, random_inputs, relative
from torch import Tensor

from torchlinearmoe.documents import Documents

pytestmark = pytest.mark.gpu

BORDERS = [0, 1, 90, 200]


def outputs_and_gradients(stack: Any, x_TD: Tensor, weights_TD: Tensor) -> list[Tensor]:
    documents = Documents.packed(BORDERS, device=x_TD.device)
    y_TD = stack(x_TD, stack.context(documents))[0]
    tensors = [x_TD, *stack.parameters()]
    return [y_TD.detach(), *torch.autograd.grad((y_TD * weights_TD).sum(), tensors)]


@pytest.mark.parametrize("name", ["mom_gla", "mom_gated_delta_net"])
def test_equals_the_cpu_in_outputs_and_gradients(name: str) -> None:
    stack = make_stack(Case(name, {}), dtype=torch.float32, kernel_backend="torch")
    x_TD, weights_TD = (random_inputs(200, seed, torch.float32) for seed in (0, 3))
    expected = outputs_and_gradients(stack, x_TD.requires_grad_(), weights_TD)
    x_TD = x_TD.detach().cuda().requires_grad_()
    found = outputs_and_gradients(stack.cuda(), x_TD, weights_TD.cuda())
    for a, b in zip(found, expected):
        assert relative(a.cpu(), b) < 1e-3


@pytest.mark.parametrize("name", ["mom_gla", "mom_gated_delta_net"])
def test_half_precision_training_does_not_wait_for_the_host(name: str) -> None:
    stack = make_stack(Case(name, {}), dtype=torch.float32, kernel_backend="torch")
    for module in stack.modules():
        if not getattr(module, "keep_fp32", False):
            for key, parameter in module.named_parameters(recurse=False):
                setattr(module, key, torch.nn.Parameter(parameter.detach().bfloat16()))
    stack.cuda()
    x_TD = random_inputs(200, dtype=torch.bfloat16).cuda().requires_grad_()
    context = stack.context(Documents.packed(BORDERS, device="cuda"))
    stack(x_TD, context)[0].sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stack(x_TD, context)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in stack.parameters())
