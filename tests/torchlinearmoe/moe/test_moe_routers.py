"""What routers keep between steps: counts before the passes, biases after them, figures of the steps since."""

import pytest
import torch
from torch import nn

from torchlinearmoe.documents import Documents
from torchlinearmoe.moe import StepTotals, collect_statistics
from torchlinearmoe.moe.routers import Routers
from torchlinearmoe.moe.statistics import load_by_layer

D, T = 6, 24


@pytest.mark.parametrize("scope", ["sequence", "global"])
def test_several_micro_batches_are_counted_first_where_a_loss_is_of_the_whole_step(build, scope: str) -> None:
    layer = build(D, balance_scope=scope, balance_coefficient=0.3)
    routers = Routers(layer, [layer])
    parts = torch.randn(T, D, dtype=torch.float64).split(8)
    calls = []

    def forward() -> None:
        calls.append([layer(x, totals=StepTotals(T, 6), documents=Documents.batch(2, 4)) for x in parts])

    routers.count_first(forward, 1)
    assert not calls
    routers.count_first(forward, len(parts))
    assert len(calls) == (scope == "global") == layer.balance.has_global_counts
    assert layer.balance.global_counts_E.sum() == (2 * T if scope == "global" else 0)
    routers.end_step(torch.zeros(()))
    assert not layer.balance.has_global_counts


@pytest.mark.parametrize("skipped", [0.0, 1.0])
def test_a_skipped_step_moves_no_bias(build, skipped: float) -> None:
    layer = build(D, balance="bias", bias_rate=0.01, num_experts=4)
    layer.step_counts_E.copy_(torch.tensor([10, 2, 4, 0]))
    Routers(layer, [layer]).end_step(torch.tensor(skipped))
    assert layer.step_counts_E.sum() == 0 and bool(layer.router.expert_bias.any()) == (not skipped)


def test_figures_are_of_the_steps_since_the_last(build) -> None:
    model = nn.ModuleDict({"a": build(D, z_loss_coefficient=0.1), "b": build(D)})
    routers = Routers(model, [model])

    def steps(count: int) -> None:
        for x in torch.randn(count, T, D, dtype=torch.float64):
            for layer in model.values():
                layer(x, totals=StepTotals(T, 6), documents=Documents.batch(6, 4))
            routers.end_step(torch.zeros(()))

    for count in (3, 1):
        steps(count)
        expected = collect_statistics(model, steps=count, reset=False)
        figures, load_NE = routers.figures()
        together = {key: value for key, value in expected.items() if key.count("/") == 1}
        assert figures == together | load_by_layer(expected) and together
        assert load_NE is not None and load_NE.shape == (2, 6) and load_NE.sum() == 2 * count * T * 2
    assert routers.figures() == ({}, None)
