"""The router of memories: its balance in training, what it counts, its precision."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from mixer_cases import Case, make_stack, random_inputs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torchlinearmoe.documents import Documents
from torchlinearmoe.mixers.mom import MoM
from torchlinearmoe.moe.balance import counting_pass, sequence_balance_loss
from torchlinearmoe.moe.statistics import collect_statistics
from torchlinearmoe.moe.totals import StepTotals


def _layer(**overrides: Any) -> MoM:
    (mixer, _) = make_stack(Case("mom_gla", overrides)).layers
    assert isinstance(mixer, MoM)
    return mixer


def _context(layer: MoM, tokens: int, row_length: int, totals: StepTotals | None):
    documents = Documents.packed(list(range(0, tokens + 1, row_length)), row_length)
    stack = make_stack(Case("mom_gla", {}))
    return dataclasses.replace(stack.context(documents), totals=totals)


def _router_gradient(layer: MoM, x_TD: Tensor, context) -> Tensor:
    layer.zero_grad()
    layer(x_TD, context)[0].square().sum().backward()
    grad = layer.get_parameter("router.weight").grad
    assert grad is not None
    return grad.clone()


def test_the_balance_loss_is_added_in_training_and_only_there() -> None:
    layer, x_TD = _layer(balance_coefficient=0.7), random_inputs(24)
    plain = _router_gradient(layer, x_TD, _context(layer, 24, 8, None))
    totals = StepTotals(48, 6)  # half of a step
    trained = _router_gradient(layer, x_TD, _context(layer, 24, 8, totals))
    layer.zero_grad()
    routing = layer.router(x_TD)
    (0.7 * sequence_balance_loss(routing.topk_ids_Tk, routing.probs_TE, 8, 6)).backward()
    balance = layer.get_parameter("router.weight").grad
    assert balance is not None and float(balance.norm()) > 1e-3
    torch.testing.assert_close(trained - plain, balance, rtol=1e-9, atol=1e-12)
    layer.eval()
    torch.testing.assert_close(_router_gradient(layer, x_TD, _context(layer, 24, 8, totals)), plain)


def test_the_global_scope_counts_the_whole_step() -> None:
    """Two micro-batches under a counting pass add up to the gradient of both in one."""
    layer, x_TD, totals = _layer(balance_coefficient=0.7, balance_scope="global"), random_inputs(24), StepTotals(24, 3)
    whole = _router_gradient(layer, x_TD, _context(layer, 24, 8, totals))
    context, halves = _context(layer, 12, 4, totals), x_TD.split(12)
    whole_reads = _router_gradient(layer, x_TD, _context(layer, 24, 8, None))
    with counting_pass(layer):
        for half in halves:
            layer(half, context)
    assert collect_statistics(layer)["mom/balance_loss"] > 0  # of the forward before, none of the counting pass
    parts = [_router_gradient(layer, half, context) for half in halves]
    reads = [_router_gradient(layer, half, _context(layer, 12, 4, None)) for half in halves]
    torch.testing.assert_close(parts[0] + parts[1] - reads[0] - reads[1], whole - whole_reads, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_is_not_counted_again(use_reentrant: bool) -> None:
    layer, x_TD = _layer(), random_inputs(24).requires_grad_()
    context = _context(layer, 24, 8, StepTotals(24, 3))
    calls = []
    layer.router.register_forward_hook(lambda *_: calls.append(1))
    y_TD = checkpoint(lambda x: layer(x, context)[0], x_TD, use_reentrant=use_reentrant)
    assert isinstance(y_TD, Tensor)
    y_TD.sum().backward()
    assert len(calls) == 2
    assert layer.statistics.counts_E.sum() == 48 and layer.statistics.tokens == 24


def test_figures_are_those_of_the_memories_router() -> None:
    layer, x_TD, totals = _layer(num_memories=3), random_inputs(24), StepTotals(24, 3)
    layer(x_TD, _context(layer, 24, 8, totals))
    figures = collect_statistics(layer)
    routing = layer.router(x_TD)
    counts = torch.bincount(routing.topk_ids_Tk.flatten(), minlength=3).double()
    assert figures["mom/max_load"] == pytest.approx((counts.max() / counts.mean()).item())
    assert figures["mom/min_load"] == pytest.approx((counts.min() / counts.mean()).item())
    loss = 0.01 * sequence_balance_loss(routing.topk_ids_Tk, routing.probs_TE, 8, 3)
    assert figures["mom/balance_loss"] == pytest.approx(loss.item())
    assert not any(key.startswith("moe/") for key in figures)


def test_routing_is_float32_beside_bfloat16() -> None:
    layer = _layer()
    for module in layer.modules():
        if not getattr(module, "keep_fp32", False):
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(parameter.detach().bfloat16()))
    layer.router.float()
    routing = layer.router(random_inputs(9, dtype=torch.bfloat16))
    assert routing.topk_weights_Tk.dtype == torch.float32
