"""Load statistics: the figures, counted once under checkpointing, over micro-batches."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchlinearmoe.documents import Documents
from torchlinearmoe.moe import StepTotals, collect_statistics
from torchlinearmoe.moe.statistics import load_by_layer

D = 6


def test_figures_are_those_of_the_routing(build) -> None:
    torch.manual_seed(0)
    layers = {"a": build(D, capacity_factor=0.5, z_loss_coefficient=0.1), "b": build(D)}
    model = nn.ModuleDict(layers)
    batches = torch.randn(3, 20, D, dtype=torch.float64)
    totals = StepTotals(60, 15)
    for x in batches:
        for layer in layers.values():
            layer(x, totals=totals, documents=Documents.batch(len(x) // 4, 4))
    figures = collect_statistics(model)
    for name, layer in layers.items():
        routing = layer.router(batches.view(60, D))
        counts = torch.bincount(routing.topk_ids_Tk.flatten(), minlength=6).double()
        mean = routing.probs_TE.mean(0)
        assert figures[f"moe/{name}/max_load"] == pytest.approx((counts.max() / counts.mean()).item())
        assert figures[f"moe/{name}/min_load"] == pytest.approx((counts.min() / counts.mean()).item())
        assert figures[f"moe/{name}/entropy"] == pytest.approx(-(mean * mean.log()).sum().item())
        loss = layer.balance(routing, totals, 4)
        assert figures[f"moe/{name}/balance_loss"] == pytest.approx(loss[0].item())
        assert (loss[1] is None) == (name == "b")
        assert figures[f"moe/{name}/z_loss"] == pytest.approx(0 if loss[1] is None else loss[1].item())
    capacity = math.ceil(20 * 2 / 6 * 0.5)
    over = sum(
        max(int((layers["a"].router(x).topk_ids_Tk == e).sum()) - capacity, 0) for x in batches for e in range(6)
    )
    assert over > 0 and figures["moe/a/dropped"] == pytest.approx(over / 120)
    assert figures["moe/b/dropped"] == 0 and figures["moe/dropped"] == figures["moe/a/dropped"]
    assert figures["moe/max_load"] == max(figures["moe/a/max_load"], figures["moe/b/max_load"])
    assert figures["moe/min_load"] == min(figures["moe/a/min_load"], figures["moe/b/min_load"])
    assert figures["moe/entropy"] == pytest.approx((figures["moe/a/entropy"] + figures["moe/b/entropy"]) / 2)
    assert figures["moe/balance_loss"] == pytest.approx(figures["moe/a/balance_loss"] + figures["moe/b/balance_loss"])
    assert collect_statistics(model) == {}


def test_loads_stand_in_the_order_of_their_layers() -> None:
    layers = {f"moe/layers.{n}.moe": load for n, load in ((2, 1.23456), (10, 3.0))} | {"mom/layers.0.mixer": 2.0}
    figures = {
        f"{path}/{name}": load / k for path, load in layers.items() for name, k in (("max_load", 1), ("min_load", 8))
    }
    found = load_by_layer({"moe/max_load": 3.0} | figures | {"moe/layers.2.moe/entropy": 1.0})
    assert found == {
        "moe/layers": [2, 10],
        "moe/max_load_by_layer": [1.235, 3.0],
        "moe/min_load_by_layer": [0.1543, 0.375],
        "mom/layers": [0],
        "mom/max_load_by_layer": [2.0],
        "mom/min_load_by_layer": [0.25],
    }
    assert load_by_layer({}) == {}


def test_collecting_without_reset_leaves_the_sums(build) -> None:
    layer = build(D)
    layer(torch.randn(4, D, dtype=torch.float64), totals=StepTotals(4, 1), documents=Documents.batch(1, 4))
    model = nn.ModuleList([layer])
    first = collect_statistics(model, reset=False, steps=2)
    assert first == collect_statistics(model, reset=False, steps=2)
    assert first["moe/balance_loss"] * 2 == pytest.approx(collect_statistics(model)["moe/balance_loss"])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_is_not_counted_again(build, use_reentrant: bool) -> None:
    torch.manual_seed(1)
    layer = build(D, balance="bias")
    x = torch.randn(10, D, dtype=torch.float64, requires_grad=True)
    calls = []
    layer.router.register_forward_hook(lambda *_: calls.append(1))
    y = (
        checkpoint(layer, x, totals=StepTotals(10, 1), documents=Documents.batch(1, 10), use_reentrant=False)
        if not use_reentrant
        else (
            checkpoint(
                lambda x: layer(x, totals=StepTotals(10, 1), documents=Documents.batch(1, 10)), x, use_reentrant=True
            )
        )
    )
    y.sum().backward()
    assert len(calls) == 2  # it did run twice
    assert layer.statistics.counts_E.sum() == 20 and layer.step_counts_E.sum() == 20
    assert layer.statistics.tokens == 10


def test_evaluation_is_not_counted(build) -> None:
    layer = build(D).eval()
    layer(torch.randn(4, D, dtype=torch.float64))
    assert collect_statistics(nn.ModuleList([layer])) == {}


def test_counters_are_not_saved_but_the_bias_is(build) -> None:
    keys = set(build(D, balance="bias", shared_hidden_size=4, shared_gate=True).state_dict())
    assert keys == {
        "router.weight",
        "router.expert_bias",
        "experts.gate_up",
        "experts.down",
        "shared.gate_proj.weight",
        "shared.up_proj.weight",
        "shared.down_proj.weight",
        "shared_gate.weight",
    }


def test_a_model_without_experts_has_no_figures() -> None:
    assert collect_statistics(nn.Linear(2, 2)) == {}
