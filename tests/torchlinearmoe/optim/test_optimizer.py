"""The optimizer as built against the textbook update, and the step that skips."""

import pytest
import torch
from torch import nn

from torchlinearmoe.optim import build_optimizer, set_learning_rate, step_if_finite
from torchlinearmoe.optim.masters import hold_masters, read_master
from torchlinearmoe.parallel.clip import gradient_norm


def textbook_adamw(parameter, gradients, rates, betas, eps, weight_decay):
    first, second = torch.zeros_like(parameter), torch.zeros_like(parameter)
    for t, (gradient, lr) in enumerate(zip(gradients, rates), start=1):
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        update = (first / (1 - betas[0] ** t)) / ((second / (1 - betas[1] ** t)).sqrt() + eps)
        parameter = parameter * (1 - lr * weight_decay) - lr * update
    return parameter


def test_updates_follow_adamw_with_decay_on_matrices_only():
    torch.manual_seed(3)
    model = nn.Linear(5, 4).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: torch.randn(3, *p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
    rates = [0.1, 0.05, 0.2]
    optimizer = build_optimizer(model, lr=9.0, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    for t, lr in enumerate(rates):
        set_learning_rate(optimizer, lr)
        for name, p in model.named_parameters():
            p.grad = gradients[name][t].clone()
        optimizer.step()
    for name, p in model.named_parameters():
        decay = 0.3 if name == "weight" else 0.0
        expected = textbook_adamw(before[name], gradients[name], rates, (0.8, 0.9), 1e-6, decay)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-10)


def test_unknown_name_is_refused_with_the_legal_ones():
    with pytest.raises(ValueError, match=r"optimizer.name = 'sgd': must be one of adamw"):
        build_optimizer(nn.Linear(2, 2), name="sgd", lr=0.1)
    with pytest.raises(ValueError, match=r"optimizer.states = 'int8': must be one of float32, bfloat16"):
        build_optimizer(nn.Linear(2, 2), states="int8", lr=0.1)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_gradients_are_clipped_as_torch_does(scale):
    torch.manual_seed(11)
    model, twin = nn.Linear(5, 4), nn.Linear(5, 4)
    twin.load_state_dict(model.state_dict())
    for p, q in zip(model.parameters(), twin.parameters()):
        gradient = torch.randn_like(p) * scale
        p.grad, q.grad = gradient, gradient.clone()
    ours, theirs = (build_optimizer(m, lr=0.1, eps=1.0) for m in (model, twin))
    step_if_finite(ours, gradient_norm(model), 1.0)
    nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    theirs.step()
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))


@pytest.mark.parametrize("split, states", [(True, "float32"), (True, "bfloat16"), (False, "bfloat16")])
def test_halves_and_rounded_moments_stay_close_to_float32(split, states):
    torch.manual_seed(13)
    exact, ours = nn.Linear(64, 64), nn.Linear(64, 64)
    ours.load_state_dict(exact.state_dict())
    if split:
        hold_masters(ours, torch.bfloat16)
        assert ours.weight.dtype == torch.bfloat16
    optimizers = [build_optimizer(exact, lr=0.01), build_optimizer(ours, lr=0.01, states=states, seed=3)]
    for _ in range(30):
        gradients = [torch.randn_like(p) + 0.3 for p in exact.parameters()]
        for module, optimizer in zip((exact, ours), optimizers):
            for p, gradient in zip(module.parameters(), gradients):
                p.grad = gradient.clone()
            step_if_finite(optimizer, torch.tensor(1.0))
    for p, q in zip(exact.parameters(), ours.parameters()):
        master = read_master(q)
        assert master.dtype == torch.float32
        tolerance = 1e-6 if states == "float32" else 5e-3  # a step of bfloat16 is up to 8e-3 of what it rounds
        assert (master - p).norm() < tolerance * p.norm()
        assert optimizers[1].state[q]["exp_avg"].dtype == getattr(torch, states)


def test_rounded_moments_follow_changes_too_small_for_bfloat16():
    """A second moment of 1 that falls by a tenth of its last bit a step: to the nearest it would stay for ever."""
    parameter = nn.Parameter(torch.zeros(4096))
    model = nn.ParameterList([parameter])
    optimizer = build_optimizer(model, lr=0.0, betas=(0.9, 0.9995), states="bfloat16")
    optimizer.init_state(parameter)["exp_avg_sq"].fill_(1.0)
    for _ in range(200):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert optimizer.state[parameter]["exp_avg_sq"].float().mean().item() == pytest.approx(0.9995**200, rel=2e-3)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_skipped_step_leaves_no_trace(split, norm):
    torch.manual_seed(5)
    model, twin = nn.Linear(5, 4), nn.Linear(5, 4)
    twin.load_state_dict(model.state_dict())
    if split:
        hold_masters(model, torch.bfloat16)
        hold_masters(twin, torch.bfloat16)
    optimizers = [build_optimizer(m, lr=0.1) for m in (model, twin)]
    gradients = [torch.randn(4, 5) for _ in range(3)]

    def step(module, optimizer, gradient, grad_norm):
        for p in module.parameters():
            p.grad = gradient.clone() if p.dim() == 2 else gradient[:, 0].clone()
        return step_if_finite(optimizer, torch.tensor(grad_norm)).item()

    assert step(model, optimizers[0], gradients[0], 1.0) == 0
    assert step(model, optimizers[0], torch.full((4, 5), norm), norm) == 1
    assert step(model, optimizers[0], gradients[1], 1.0) == 0
    for gradient in gradients[:2]:
        step(twin, optimizers[1], gradient, 1.0)
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.equal(read_master(p), read_master(q))
        for ours, theirs in zip(optimizers[0].state[p].values(), optimizers[1].state[q].values()):
            assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("split", [True, False])
def test_on_a_gpu_clipping_and_a_skipped_step_never_wait_for_the_device(split):
    torch.manual_seed(7)
    model = nn.Linear(64, 64, device="cuda")
    if split:
        hold_masters(model, torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, lr=0.1)
    model(torch.randn(8, 64, device="cuda", dtype=model.weight.dtype)).square().sum().backward()
    model.weight.grad = torch.full_like(model.weight, float("nan"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        skipped = step_if_finite(optimizer, gradient_norm(model), 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert skipped.item() == 1
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
