"""Padding takes part in nothing: losses, counts, figures and capacity are those of the tokens that count."""

import pytest
import torch
from torch import Tensor

from torchlinearmoe.documents import Documents
from torchlinearmoe.moe import MoE, StepTotals, collect_statistics, counting_pass

D, E, K, L = 6, 5, 2, 6
FILLED = (4, 0, 6, 1)
REAL = sum(FILLED)
DOCUMENTS = Documents.packed([0, 3, 4, 6, 12, 18, 19, 24], L, filled=FILLED)
TOTALS = StepTotals(4 * L, 4, torch.tensor(float(REAL), dtype=torch.float64))


def stream() -> Tensor:
    torch.manual_seed(0)
    x_TD = torch.randn(4 * L, D, dtype=torch.float64)
    counted_T = DOCUMENTS.counted
    assert counted_T is not None
    x_TD[~counted_T] = torch.tensor([3.0, -1, 0, 2, 0, 1], dtype=torch.float64)  # all pads to the same experts
    return x_TD


def real(x_TD: Tensor) -> Tensor:
    return torch.cat([row[:count] for row, count in zip(x_TD.view(4, L, D), FILLED)])


def definition(layer: MoE, scope: str) -> Tensor:
    """0.3 times the balance loss and 0.1 times the z-loss of the real tokens."""
    logits_TE = real(stream()) @ layer.router.weight.T
    balance = logits_TE.new_zeros(())
    for part in logits_TE.split(FILLED) if scope == "sequence" else [logits_TE]:
        probs_TE = part.softmax(-1)
        chosen_TE = torch.zeros_like(probs_TE).scatter(1, probs_TE.topk(K).indices, 1.0)
        if len(part):
            balance = balance + E * (chosen_TE.mean(0) / K * probs_TE.mean(0)).sum()
    sequences = len(FILLED) if scope == "sequence" else 1
    return 0.3 * balance / sequences + 0.1 * logits_TE.logsumexp(-1).square().mean()


@pytest.mark.parametrize("scope", ["sequence", "global"])
def test_losses_are_those_of_the_tokens_that_count(build, scope: str) -> None:
    torch.manual_seed(1)
    layer = build(D, num_experts=E, balance_scope=scope, balance_coefficient=0.3, z_loss_coefficient=0.1)
    expected = torch.autograd.grad(definition(layer, scope), layer.router.weight)[0]
    y_TD = layer(stream(), totals=TOTALS, documents=DOCUMENTS)
    y_TD.backward(torch.zeros_like(y_TD))
    torch.testing.assert_close(layer.router.weight.grad, expected)
    figures = collect_statistics(layer)
    assert figures["moe/balance_loss"] + figures["moe/z_loss"] == pytest.approx(definition(layer, scope).item())


def test_counts_and_figures_are_those_of_the_tokens_that_count(build) -> None:
    torch.manual_seed(2)
    layer, alone = build(D, num_experts=E, balance="bias"), build(D, num_experts=E, balance="bias")
    alone.load_state_dict(layer.state_dict())
    for module, x_TD, documents in ((layer, stream(), DOCUMENTS), (alone, real(stream()), None)):
        module(x_TD, documents=documents)
        with counting_pass(module):
            module(x_TD, documents=documents)
    assert torch.equal(layer.step_counts_E, alone.step_counts_E) and layer.step_counts_E.sum() == REAL * K
    assert torch.equal(layer.balance.global_counts_E, alone.balance.global_counts_E)
    assert collect_statistics(layer) == pytest.approx(collect_statistics(alone))


@pytest.mark.parametrize("policy", ["probability", "position"])
def test_padding_takes_no_capacity(build, policy: str) -> None:
    torch.manual_seed(3)
    layer = build(D, num_experts=E, capacity_factor=0.8, drop_policy=policy)
    found = real(layer(stream(), documents=DOCUMENTS))
    dropped = collect_statistics(layer)["moe/dropped"]
    torch.testing.assert_close(found, layer(real(stream())))
    assert 0 < dropped == collect_statistics(layer)["moe/dropped"] < 1


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_padding_goes_to_no_expert(build, mode: str) -> None:
    layer = build(D, num_experts=E).train(mode == "training")
    y_TD = layer(stream(), documents=DOCUMENTS)
    assert DOCUMENTS.counted is not None and not y_TD[~DOCUMENTS.counted].any()
    torch.testing.assert_close(real(y_TD), layer(real(stream())))


@pytest.mark.parametrize("policy", ["probability", "position"])
def test_outside_training_every_sequence_has_its_own_capacity(build, policy: str) -> None:
    torch.manual_seed(4)
    layer = build(D, num_experts=E, eval_capacity_factor=0.7, drop_policy=policy).eval()
    x_TD = stream()
    found = layer(x_TD, documents=DOCUMENTS).view(4, L, D)
    dropless = build(D, num_experts=E).eval()
    dropless.load_state_dict(layer.state_dict())
    assert not torch.allclose(found[2], dropless(x_TD).view(4, L, D)[2])
    for row, count, y_TD in zip(x_TD.view(4, L, D), FILLED, found):
        torch.testing.assert_close(y_TD[:count], layer(row[:count]))
    prompts = Documents.prompts([5, 3, 16])
    alone = [layer(prompt) for prompt in x_TD.split([5, 3, 16])]
    torch.testing.assert_close(layer(x_TD, documents=prompts), torch.cat(alone))


def test_a_step_of_decoding_drops_nothing(build) -> None:
    torch.manual_seed(5)
    layer, dropless = build(D, num_experts=E, eval_capacity_factor=0.1).eval(), build(D, num_experts=E).eval()
    dropless.load_state_dict(layer.state_dict())
    x_BD = stream()
    torch.testing.assert_close(layer(x_BD, documents=Documents.batch(len(x_BD), 1)), dropless(x_BD))
