"""The whole layer against a dense computation: every expert on every token, masked by the routing."""

import pytest
import torch
from torch import Tensor

from torchlinearmoe.documents import Documents
from torchlinearmoe.initialize import initialize
from torchlinearmoe.moe import MoE, StepTotals
from torchlinearmoe.moe.capacity import expert_capacity, keep_within_capacity

D = 6


def dense(layer: MoE, x: Tensor, renormalize: bool, top_k: int, keep: Tensor | None = None) -> Tensor:
    """Token by token, expert by expert, with nothing of the layer's code but its parameters."""
    width = layer.experts.down.shape[1]
    outputs = []
    for t, token in enumerate(x):
        probs = (layer.router.weight @ token).softmax(-1)
        chosen = sorted(range(len(probs)), key=lambda e: -probs[e].item())[:top_k]
        norm = sum(probs[e] for e in chosen) if renormalize else 1.0
        y = torch.zeros_like(token)
        for j, e in enumerate(chosen):
            if keep is not None and not keep[t, j]:
                continue
            inner = token if layer.latent_down is None else layer.latent_down.weight @ token
            if layer.experts.gated:
                gate, up = (inner @ layer.experts.into[e]).split(width)
                hidden = gate * gate.sigmoid() * up
            else:
                up = inner @ layer.experts.into[e]
                hidden = up * up * (up > 0)
            out = hidden @ layer.experts.down[e]
            y = y + probs[e] / norm * (out if layer.latent_up is None else layer.latent_up.weight @ out)
        if layer.shared is not None:
            up = layer.shared.up_proj.weight @ token
            if layer.experts.gated:
                gate = layer.shared.gate_proj.weight @ token
                hidden = gate * gate.sigmoid() * up
            else:
                hidden = up * up * (up > 0)
            shared = layer.shared.down_proj.weight @ hidden
            if layer.shared_gate is not None:
                shared = shared * (layer.shared_gate.weight @ token).sigmoid()
            y = y + shared
        outputs.append(y)
    return torch.stack(outputs)


def compare(layer: MoE, x: Tensor, expected: Tensor, got: Tensor, dy: Tensor) -> None:
    inputs = [x, *layer.parameters()]
    torch.testing.assert_close(got, expected)
    # A weight may get no gradient, as the router's with one renormalised expert: its output is constant.
    for g, e in zip(
        *(torch.autograd.grad(y, inputs, dy, allow_unused=True, materialize_grads=True) for y in (got, expected))
    ):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 6])
@pytest.mark.parametrize("T", [1, 30])
def test_equals_the_dense_computation(build, T: int, top_k: int, renormalize: bool) -> None:
    torch.manual_seed(T + top_k)
    layer = build(D, top_k=top_k, renormalize=renormalize)
    x, dy = torch.randn(2, T, D, dtype=torch.float64)
    x.requires_grad_()
    compare(layer, x, dense(layer, x, renormalize, top_k), layer(x), dy)


@pytest.mark.parametrize("gated", [True, False])
def test_shared_expert_is_added(build, gated: bool) -> None:
    torch.manual_seed(3)
    layer = build(D, shared_hidden_size=5, shared_gate=gated)
    x, dy = torch.randn(2, 12, D, dtype=torch.float64)
    x.requires_grad_()
    compare(layer, x, dense(layer, x, True, 2), layer(x), dy)


@pytest.mark.parametrize("latent_size", [0, 4])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("backend", ["loop", "reference"])
def test_experts_without_gates_and_on_latent_channels(build, activation: str, latent_size: int, backend: str) -> None:
    """Steps around them, or all of it at once."""
    torch.manual_seed(11)
    layer = build(D, activation=activation, latent_size=latent_size, shared_hidden_size=5, backend=backend)
    assert {name for name, _ in layer.experts.named_parameters()} == {
        "gate_up" if activation == "swiglu" else "up",
        "down",
    }
    x, dy = torch.randn(2, 12, D, dtype=torch.float64)
    x.requires_grad_()
    compare(layer, x, dense(layer, x, True, 2), layer(x), dy)


@pytest.mark.parametrize("top_k", [1, 2])
def test_all_tokens_to_the_same_experts(build, top_k: int) -> None:
    torch.manual_seed(4)
    layer = build(D, top_k=top_k)
    x, dy = torch.randn(2, 20, D, dtype=torch.float64)
    x[:, 0] = 5.0
    with torch.no_grad():
        layer.router.weight[:, 0] = torch.tensor([0.0, 50.0, 0.0, 0.0, 40.0, 0.0])
    x.requires_grad_()
    compare(layer, x, dense(layer, x, True, top_k), layer(x), dy)
    assert layer.statistics.counts_E.tolist() == [0, 20, 0, 0, 20 * (top_k - 1), 0]


@pytest.mark.parametrize("policy", ["probability", "position"])
@pytest.mark.parametrize("factor", [0.25, 1.0])
def test_dropped_assignments_give_nothing_and_leave_the_other_weights(build, policy: str, factor: float) -> None:
    torch.manual_seed(5)
    layer = build(D, capacity_factor=factor, drop_policy=policy)
    x, dy = torch.randn(2, 30, D, dtype=torch.float64)
    routing = layer.router(x)
    keep = keep_within_capacity(routing.topk_ids_Tk, routing.probs_TE, expert_capacity(30, 2, 6, factor), policy)
    assert not keep.all()
    x.requires_grad_()
    compare(layer, x, dense(layer, x, True, 2, keep), layer(x), dy)


def test_capacity_binds_in_its_own_mode_only(build) -> None:
    torch.manual_seed(6)
    x = torch.randn(30, D, dtype=torch.float64)
    layer = build(D, capacity_factor=0.25)
    dropless = dense(layer, x, True, 2)
    assert not torch.allclose(layer(x), dropless)
    torch.testing.assert_close(layer.eval()(x), dropless)
    layer = build(D, eval_capacity_factor=0.25)
    dropless = dense(layer, x, True, 2)
    torch.testing.assert_close(layer(x), dropless)
    assert not torch.allclose(layer.eval()(x), dropless)


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_and_loop_agree_on_the_whole_layer(build, dtype: torch.dtype, capacity_factor: float | None) -> None:
    torch.manual_seed(7)
    options = {"hidden_size": 24, "num_experts": 8, "capacity_factor": capacity_factor}
    grouped = build(16, torch.float32, backend="grouped_mm", **options)
    loop = build(16, torch.float32, backend="loop", **options)
    loop.load_state_dict(grouped.state_dict())
    results = []
    for layer in (grouped, loop):
        layer.experts.to(dtype)
        torch.manual_seed(8)
        x = torch.randn(40, 16).to(dtype).requires_grad_()
        y = layer(x, totals=StepTotals(40, 4), documents=Documents.batch(4, 10))
        results.append([y, *torch.autograd.grad(y, [x, *layer.parameters()], torch.randn(40, 16).to(dtype))])
        assert y.dtype == dtype and all(torch.isfinite(t).all() for t in results[-1])
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance * 4)


def test_compiled_pieces_around_an_eager_router_change_nothing(build) -> None:
    torch.manual_seed(9)
    layer = build(16, torch.float32, hidden_size=8, shared_hidden_size=8, shared_gate=True, balance_coefficient=0.1)
    x, dy = torch.randn(2, 12, 16)
    totals = StepTotals(12, 3)

    def run() -> list[Tensor]:
        inputs = [x.requires_grad_(), *layer.parameters()]
        y = layer(x, totals=totals, documents=Documents.batch(3, 4))
        return [y, *torch.autograd.grad(y, inputs, dy)]

    expected = run()
    for owner, name in [
        (layer.dispatcher, "dispatch"),
        (layer.dispatcher, "combine"),
        (layer.experts, "forward"),
        (layer, "add_shared"),
    ]:
        setattr(owner, name, torch.compile(getattr(owner, name), fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(run(), expected)


def test_initialisation_covers_the_layer(build) -> None:
    layer = build(D, torch.float32, shared_hidden_size=4, shared_gate=True, balance="bias")
    layer(torch.randn(8, D))
    layer.router.expert_bias.fill_(1.0)
    initialize(layer, seed=0)
    assert layer.step_counts_E.sum() == layer.statistics.counts_E.sum() == layer.router.expert_bias.sum() == 0
    assert all(0 < p.abs().max() < 0.2 for p in layer.parameters())


@pytest.mark.parametrize("factor", [None, 0.5])
def test_a_backend_that_goes_from_tokens_to_sums_gives_the_same(build, factor: float | None, monkeypatch) -> None:
    torch.manual_seed(10)
    options = {"capacity_factor": factor, "balance_coefficient": 0.1}
    steps, whole = (build(D, backend=backend, **options) for backend in ("loop", "reference"))
    whole.load_state_dict(steps.state_dict())
    assert whole.experts.take_tokens(torch.zeros(1, D)) and not steps.experts.take_tokens(torch.zeros(1, D))
    monkeypatch.setattr(whole.dispatcher, "dispatch", None)
    documents = Documents.packed([0, 3, 4, 6, 12, 18, 19, 24], 6, filled=(4, 0, 6, 1))
    totals = StepTotals(24, 4, torch.tensor(11.0, dtype=torch.float64))
    x, dy = torch.randn(2, 24, D, dtype=torch.float64)
    results = []
    for layer in (steps, whole):
        inputs = [x.requires_grad_(), *layer.parameters()]
        y = layer(x, totals=totals, documents=documents)
        results.append([y, *torch.autograd.grad(y, inputs, dy)])
    torch.testing.assert_close(*results)
