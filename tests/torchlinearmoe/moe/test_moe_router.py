"""Router: the choice, the weights of the chosen, the selection bias."""

import pytest
import torch

from torchlinearmoe.moe.router import Router


def router(T: int = 40, D: int = 8, E: int = 6, k: int = 3, **options) -> tuple[Router, torch.Tensor]:
    module = Router(D, E, k, **options)
    torch.nn.init.normal_(module.weight)
    return module, torch.randn(T, D)


@pytest.mark.parametrize("renormalize", [True, False])
def test_chooses_the_largest_probabilities(renormalize: bool) -> None:
    torch.manual_seed(0)
    module, x = router(renormalize=renormalize)
    routing = module(x)
    weight = module.weight.detach()
    for t in range(x.shape[0]):
        probs = torch.tensor([(weight[e] * x[t]).sum() for e in range(6)]).exp()
        probs /= probs.sum()
        best = sorted(range(6), key=lambda e: -probs[e].item())[:3]
        assert routing.topk_ids_Tk[t].tolist() == best
        expected = probs[best] / probs[best].sum() if renormalize else probs[best]
        torch.testing.assert_close(routing.topk_weights_Tk[t].detach(), expected)
        torch.testing.assert_close(routing.probs_TE[t].detach(), probs)
    assert routing.topk_ids_Tk.dtype == torch.int64


def test_bf16_input_is_routed_in_fp32() -> None:
    torch.manual_seed(1)
    module, x = router(T=200, D=64)
    x = x.bfloat16()
    routing, wide = module(x), module(x.float())
    assert {t.dtype for t in routing} == {torch.int64, torch.float32}
    for got, expected in zip(routing, wide):
        assert torch.equal(got, expected)


def test_renormalised_weights_survive_vanishing_probabilities() -> None:
    module, _ = router(k=2, selection_bias=True)
    assert module.expert_bias is not None
    with torch.no_grad():
        module.weight.zero_()[:, 0] = torch.tensor([0.0, -300.0, -301.0, -400.0, -400.0, -400.0])
        module.expert_bias += torch.tensor([-9.0, 0, 0, -9, -9, -9])
    routing = module(torch.eye(8)[:1])
    assert sorted(routing.topk_ids_Tk[0].tolist()) == [1, 2]
    torch.testing.assert_close(routing.topk_weights_Tk.sort().values, torch.tensor([[-1.0, 0.0]]).softmax(-1))


def test_bias_changes_the_selection_and_nothing_else() -> None:
    torch.manual_seed(2)
    module, x = router(selection_bias=True, renormalize=False)
    plain = module(x)
    assert module.expert_bias is not None
    module.expert_bias[4] += 2.0  # more than any probability
    biased = module(x)
    assert (biased.topk_ids_Tk == 4).any(-1).all() and not (plain.topk_ids_Tk == 4).any(-1).all()
    assert torch.equal(biased.probs_TE, plain.probs_TE)
    assert torch.equal(biased.topk_weights_Tk, plain.probs_TE.gather(1, biased.topk_ids_Tk))
    assert "expert_bias" in module.state_dict() and "expert_bias" not in router()[0].state_dict()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("groups", "chosen"), [(1, 1), (2, 1), (3, 2), (6, 3), (6, 6)])
def test_a_token_stays_within_the_groups_of_its_best_experts(groups: int, chosen: int, biased: bool) -> None:
    """Against sorting groups by their best expert, then the experts of the first groups, token by token."""
    torch.manual_seed(3)
    E = 12
    options = {"num_groups": groups, "top_k_groups": chosen, "renormalize": False, "selection_bias": biased}
    k = min(3 if groups < 6 else 4, chosen * (E // groups))
    module, x = router(T=60, E=E, k=k, scaling=16.0, **options)
    bias_E = torch.zeros(E)
    if module.expert_bias is not None:
        bias_E = module.expert_bias.normal_(0, 0.3).sub_(0.4)  # scores below zero too
    routing = module(x)
    probs_TE = (x @ module.weight.detach().T).softmax(-1)
    size = E // groups
    for t in range(x.shape[0]):
        scores = (probs_TE[t] + bias_E).tolist()
        ranked = sorted(range(groups), key=lambda g: -max(scores[g * size : (g + 1) * size]))
        allowed = [g * size + e for g in ranked[:chosen] for e in range(size)]
        best = sorted(allowed, key=lambda e: -scores[e])[:k]
        assert routing.topk_ids_Tk[t].tolist() == best
        torch.testing.assert_close(routing.topk_weights_Tk[t].detach(), 16.0 * probs_TE[t, best])
    torch.testing.assert_close(routing.probs_TE.detach(), probs_TE)


@pytest.mark.parametrize("renormalize", [True, False])
def test_the_scaling_multiplies_the_weights_and_nothing_else(renormalize: bool) -> None:
    torch.manual_seed(4)
    module, x = router(renormalize=renormalize)
    plain = module(x)
    module.scaling = 2.5
    scaled = module(x)
    torch.testing.assert_close(scaled.topk_weights_Tk, 2.5 * plain.topk_weights_Tk)
    assert torch.equal(scaled.topk_ids_Tk, plain.topk_ids_Tk) and torch.equal(scaled.probs_TE, plain.probs_TE)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("groups", "chosen"), [(0, 0), (3, 2), (4, 2)])
def test_sigmoids_choose_with_their_bias_by_the_two_best_of_a_group_and_weigh_without(
    groups: int, chosen: int, renormalize: bool
) -> None:
    """Token by token: s = sigmoid(x W); s + b chooses; weights are s, over the sum of the chosen where rescaled."""
    torch.manual_seed(5)
    options = {"num_groups": groups, "top_k_groups": chosen, "group_score": "top2", "renormalize": renormalize}
    module, x = router(T=60, E=12, k=4, scaling=2.5, score="sigmoid", selection_bias=True, **options)
    module.double()
    assert module.expert_bias is not None
    bias_E = module.expert_bias.normal_(-0.5, 0.4)  # scores below zero too
    x = x.double()
    routing = module(x)
    sigmoid_TE = 1 / (1 + torch.exp(-(x @ module.weight.detach().T)))
    size = 12 // (groups or 1)
    for t in range(x.shape[0]):
        s = sigmoid_TE[t]
        scores = (s + bias_E).tolist()

        def two_best(g: int, scores: list[float] = scores) -> float:
            return sum(sorted(scores[g * size : (g + 1) * size])[-2:])

        ranked = sorted(range(groups or 1), key=two_best, reverse=True)[: chosen or 1]
        allowed = [g * size + e for g in ranked for e in range(size)]
        best = sorted(allowed, key=lambda e: -scores[e])[:4]
        assert routing.topk_ids_Tk[t].tolist() == best
        weights = 2.5 * s[best] / (s[best].sum() if renormalize else 1)
        torch.testing.assert_close(routing.topk_weights_Tk[t].detach(), weights, rtol=1e-12, atol=0)
        torch.testing.assert_close(routing.probs_TE[t].detach(), s / s.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("top_k", [0, 7])
def test_refuses_an_impossible_top_k(top_k: int) -> None:
    with pytest.raises(ValueError, match=rf"moe.top_k = {top_k}.*num_experts = 6"):
        Router(8, 6, top_k)
