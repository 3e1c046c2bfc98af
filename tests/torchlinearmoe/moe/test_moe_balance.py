"""Balance and z-loss against brute force, independence of how a step is cut, and the selection bias."""

import math

import pytest
import torch

from torchlinearmoe.documents import Documents
from torchlinearmoe.moe import StepTotals, counting_pass, needs_counting_pass, update_bias
from torchlinearmoe.moe.balance import (
    _sum_rows,
    attach_loss,
    global_balance_loss,
    sequence_balance_loss,
    z_loss,
)

T, D, E, K = 24, 6, 6, 2


def stream(seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(T, D, dtype=torch.float64)


def brute_force(layer, x: torch.Tensor, row_length: int, scope: str) -> torch.Tensor:
    """The definition, written with loops; differentiable in the router's weight."""
    logits = x @ layer.router.weight.T
    probs = logits.exp() / logits.exp().sum(-1, keepdim=True)
    chosen = [sorted(range(E), key=lambda e: -p[e].item())[:K] for p in probs]
    spans = [range(s, s + row_length) for s in range(0, T, row_length)] if scope == "sequence" else [range(T)]
    losses = []
    for span in spans:
        total = 0.0
        for e in range(E):
            f = sum(e in chosen[t] for t in span) / (len(span) * K)
            total = total + f * torch.stack([probs[t, e] for t in span]).mean()
        losses.append(E * total)
    return torch.stack(losses).mean()


def router_gradient(layer, micro_batches, totals, row_length) -> torch.Tensor:
    """Gradient of the attached losses alone: the output's own gradient is zero."""
    layer.zero_grad()
    for x in micro_batches:
        y = layer(x, totals=totals, documents=Documents.batch(len(x) // row_length, row_length))
        y.backward(torch.zeros_like(y))
    return layer.router.weight.grad.clone()


@pytest.mark.parametrize("scope", ["sequence", "global"])
@pytest.mark.parametrize("row_length", [4, 24])
def test_gradient_is_that_of_the_definition(build, scope: str, row_length: int) -> None:
    layer = build(D, balance_scope=scope, balance_coefficient=0.3, num_experts=E, top_k=K)
    x = stream(0)
    expected = torch.autograd.grad(0.3 * brute_force(layer, x, row_length, scope), layer.router.weight)[0]
    got = router_gradient(layer, [x], StepTotals(T, T // row_length), row_length)
    torch.testing.assert_close(got, expected)
    assert expected.abs().max() > 1e-3


def test_loss_values_are_those_of_the_definition(build) -> None:
    layer = build(D)
    x = stream(1)
    routing = layer.router(x)
    expected = brute_force(layer, x, 8, "sequence")
    torch.testing.assert_close(sequence_balance_loss(routing.topk_ids_Tk, routing.probs_TE, 8, 3), expected)
    counts = torch.bincount(routing.topk_ids_Tk.flatten(), minlength=E)
    expected = brute_force(layer, x, 8, "global")
    torch.testing.assert_close(global_balance_loss(counts, routing.probs_TE, K, T), expected)
    expected = sum(math.log(row.exp().sum()) ** 2 for row in routing.logits_TE.detach()) / T
    torch.testing.assert_close(z_loss(routing.logits_TE, T).item(), expected)


def test_perfect_balance_gives_one() -> None:
    ids = torch.arange(E).repeat(4).view(-1, K)
    probs = torch.full((ids.shape[0], E), 1 / E)
    torch.testing.assert_close(sequence_balance_loss(ids, probs, E // K, 4), torch.tensor(1.0))
    torch.testing.assert_close(global_balance_loss(torch.full((E,), 4), probs, K, 12), torch.tensor(1.0))


@pytest.mark.parametrize("scope", ["sequence", "global"])
def test_splitting_a_step_changes_nothing(build, scope: str) -> None:
    layer = build(D, balance_scope=scope, balance_coefficient=0.3, z_loss_coefficient=0.1, num_experts=E, top_k=K)
    x, totals = stream(2), StepTotals(T, 6)
    assert needs_counting_pass(layer) == (scope == "global")
    whole = router_gradient(layer, [x], totals, 4)
    parts = x.split(8)
    if scope == "global":
        with pytest.raises(ValueError, match="8 of the step's 24 tokens"):
            router_gradient(layer, parts, totals, 4)
        with counting_pass(layer):
            for part in parts:
                layer(part, totals=totals, documents=Documents.batch(2, 4))
    torch.testing.assert_close(router_gradient(layer, parts, totals, 4), whole)


def test_counting_pass_touches_nothing_else(build) -> None:
    layer = build(D, balance_scope="global", balance_coefficient=0.3, num_experts=E, top_k=K)
    with counting_pass(layer):
        y = layer(stream(3), totals=StepTotals(T, 1), documents=Documents.batch(1, T))
    assert not y.requires_grad and not layer.balance.counting
    assert layer.statistics.counts_E.sum() == 0 and layer.step_counts_E.sum() == 0
    assert layer.balance.global_counts_E.sum() == T * K


def test_z_loss_gradient(build) -> None:
    layer = build(D, balance="none", z_loss_coefficient=0.2, num_experts=E, top_k=K)
    x = stream(4)
    logits = x @ layer.router.weight.T
    expected = torch.autograd.grad(0.2 * logits.exp().sum(-1).log().square().mean(), layer.router.weight)[0]
    torch.testing.assert_close(router_gradient(layer, [x], StepTotals(T, 1), T), expected)


@pytest.mark.parametrize("balance", ["none", "bias"])
def test_other_kinds_add_no_balance_loss(build, balance: str) -> None:
    layer = build(D, balance=balance, balance_coefficient=0.5, num_experts=E, top_k=K)
    assert router_gradient(layer, [stream(5)], StepTotals(T, 1), T).abs().max() == 0


def test_no_loss_in_evaluation_or_without_totals(build) -> None:
    layer = build(D, balance_coefficient=0.5, num_experts=E, top_k=K)
    assert router_gradient(layer, [stream(6)], None, T).abs().max() == 0
    layer.eval()
    assert router_gradient(layer, [stream(6)], StepTotals(T, 1), T).abs().max() == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_attached_loss_has_factor_one(compiled: bool) -> None:
    torch.manual_seed(7)
    x, w = torch.randn(5, requires_grad=True), torch.randn(3, requires_grad=True)

    def run(x, w):
        return attach_loss(x * 2, w.square().sum()) * 1000

    run_ = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    y = run_(x, w)
    torch.testing.assert_close(y, x * 2000)
    y.backward(torch.full_like(y, 7.0))
    torch.testing.assert_close(x.grad, torch.full_like(x, 14000.0))
    torch.testing.assert_close(w.grad, 2 * w.detach())


@pytest.mark.parametrize("parts, row_length", [(1, 4), (2, 4), (2, 24), (4, 3), (3, 12), (4, 8)])
def test_rows_are_summed_wherever_the_stream_is_cut(parts: int, row_length: int) -> None:
    values = stream(8)
    expected = values.view(-1, row_length, D).sum(1)
    pieces = [_sum_rows(piece, row_length, parts, i) for i, piece in enumerate(values.chunk(parts))]
    torch.testing.assert_close(sum(pieces), expected)
    assert all(piece.shape == expected.shape for piece in pieces)


def test_rows_that_do_not_fill_the_stream_are_refused(build) -> None:
    with pytest.raises(ValueError, match="row_length = 7: must divide the stream of 24 tokens"):
        sequence_balance_loss(torch.zeros(T, K, dtype=torch.int64), torch.ones(T, E), 7, 1)
    with pytest.raises(ValueError, match="needs row_length"):
        build(D)(stream(9), totals=StepTotals(T, 1))


def test_illegal_choices_are_named(build) -> None:
    with pytest.raises(ValueError, match="moe.balance = 'aux'.*loss, bias, none"):
        build(D, balance="aux")
    with pytest.raises(ValueError, match="moe.balance_scope = 'batch'.*sequence, global"):
        build(D, balance_scope="batch")
    with pytest.raises(ValueError, match="moe.drop_policy = 'random'.*probability, position"):
        build(D, drop_policy="random")


def test_bias_update_moves_each_expert_toward_the_mean(build) -> None:
    layer, fixed = build(D, balance="bias", bias_rate=0.01, num_experts=4), build(D, num_experts=4)
    layer.step_counts_E.copy_(torch.tensor([10, 2, 4, 0]))
    update_bias([layer, fixed])
    signs = torch.tensor([-1.0, 1.0, 0.0, 1.0])
    torch.testing.assert_close(layer.router.expert_bias.float(), 0.01 * (signs - signs.mean()))
    assert layer.step_counts_E.sum() == 0
    torch.testing.assert_close(layer.router.expert_bias.sum().item(), 0.0)


@pytest.mark.parametrize("balance", ["loss", "none"])
def test_a_selection_bias_stays_as_it_is_unless_it_balances(build, balance: str) -> None:
    layer = build(D, balance=balance, bias_rate=0.01, num_experts=4, top_k=2, selection_bias=True)
    layer.router.expert_bias[2] = 10.0
    before = layer.router.expert_bias.clone()
    layer(torch.randn(50, D, dtype=torch.float64))
    update_bias([layer])
    assert torch.equal(layer.router.expert_bias, before) and layer.statistics.counts_E[2] == 50
    assert layer.step_counts_E.sum() == 0  # nothing adds up that nobody reads


def test_bias_balances_a_skewed_router(build) -> None:
    torch.manual_seed(10)
    layer = build(D, balance="bias", bias_rate=0.003, num_experts=E, top_k=K)
    x = torch.randn(2000, D, dtype=torch.float64) + 0.7
    loads = []
    for _ in range(200):
        for part in x.split(500):
            layer(part)
        loads.append((layer.step_counts_E.max() / layer.step_counts_E.double().mean()).item())
        update_bias([layer])
    assert loads[0] > 1.5 and max(loads[-10:]) < 1.1
