"""Compiled regions: modules of one kind share their graphs, others have their own, where layers run again too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from torchlinearmoe.module import Module
from torchlinearmoe.moe.balance import Balance
from torchlinearmoe.moe.dispatch import LocalDispatch
from torchlinearmoe.moe.router import Router
from torchlinearmoe.moe.statistics import LoadStatistics
from torchlinearmoe.moe.totals import StepTotals
from torchlinearmoe.parallel.compile import compile_regions

D, T = 6, 8


class Layer(Module):
    """A router of some width and its rows, with all that is counted."""

    regions = ("dispatcher.dispatch", "dispatcher.combine")

    def __init__(self, num_experts: int, top_k: int, coefficient: float) -> None:
        super().__init__()
        self.router, self.dispatcher = Router(D, num_experts, top_k), LocalDispatch(num_experts)
        self.balance, self.statistics = Balance(num_experts, coefficient=coefficient), LoadStatistics(num_experts)
        nn.init.normal_(self.router.weight, std=0.1, generator=torch.Generator().manual_seed(num_experts))

    def forward(self, x_TD: Tensor) -> Tensor:
        routing = self.router(x_TD)
        x_RD, _, context = self.dispatcher.dispatch(x_TD, routing)
        losses = self.balance(routing, StepTotals(T, 1), T)
        assert losses is not None and losses[0] is not None
        self.statistics.record(routing.topk_ids_Tk, routing.probs_TE, None, losses)
        return x_TD + self.dispatcher.combine(x_RD.sin(), context) + losses[0]


def build() -> nn.ModuleList:
    sizes = [(4, 2, 0.1), (3, 2, 0.2), (4, 2, 0.3), (5, 1, 0.1)]
    return nn.ModuleList(Layer(*size) for size in sizes)


def gradients(layers: nn.ModuleList, x_TD: Tensor) -> list[Tensor]:
    y_TD = x_TD
    for layer in layers:
        y_TD = checkpoint(layer, y_TD, use_reentrant=False)
    y_TD.square().sum().backward()
    found = [parameter.grad for parameter in layers.parameters()]
    assert all(grad is not None and grad.norm() > 0 for grad in found)
    return [grad for grad in found if grad is not None]


@pytest.mark.slow
def test_layers_of_several_sizes_run_again_as_they_ran() -> None:
    plain, compiled = build(), build()
    torch._dynamo.reset()
    assert compile_regions(compiled, "aot_eager") == 4 * 6
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        torch.testing.assert_close(gradients(compiled, x_TD), gradients(plain, x_TD))


def test_equal_layers_share_graphs_and_none_is_for_any_size() -> None:
    layers = build()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compile_regions(layers, counter)  # pyright: ignore[reportArgumentType]
    x_TD = torch.randn(T, D)
    for layer in layers[:2]:
        layer(x_TD)
    once = counter.frame_count
    for layer in layers[:3]:
        layer(x_TD)
    assert counter.frame_count == once
    sizes = {
        str(node.meta["example_value"].shape)
        for graph in counter.graphs
        for node in graph.graph.nodes
        if isinstance(node.meta.get("example_value"), Tensor)
    }
    assert sizes and not any("s" in size.split("[")[1] for size in sizes), sizes
