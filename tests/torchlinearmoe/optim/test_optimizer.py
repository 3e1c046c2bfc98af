"""The optimizer as built against the textbook update, and the step that skips."""

import pytest
import torch
from torch import nn

from torchlinearmoe.optim import build_optimizer, set_learning_rate, step_if_finite
from torchlinearmoe.parallel.clip import clip_gradients


def textbook_adamw(parameter, gradients, rates, betas, eps, weight_decay):
    first, second = torch.zeros_like(parameter), torch.zeros_like(parameter)
    for t, (gradient, lr) in enumerate(zip(gradients, rates), start=1):
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        update = (first / (1 - betas[0] ** t)) / ((second / (1 - betas[1] ** t)).sqrt() + eps)
        parameter = parameter * (1 - lr * weight_decay) - lr * update
    return parameter


@pytest.mark.parametrize("fused", [None, True, False])
def test_updates_follow_adamw_with_decay_on_matrices_only(fused):
    torch.manual_seed(3)
    model = nn.Linear(5, 4).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: torch.randn(3, *p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
    rates = [0.1, 0.05, 0.2]
    optimizer = build_optimizer(model, lr=9.0, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3, fused=fused)
    for t, lr in enumerate(rates):
        set_learning_rate(optimizer, lr)
        for name, p in model.named_parameters():
            p.grad = gradients[name][t].clone()
        optimizer.step()
    for name, p in model.named_parameters():
        decay = 0.3 if name == "weight" else 0.0
        expected = textbook_adamw(before[name], gradients[name], rates, (0.8, 0.9), 1e-6, decay)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-10)


def test_takes_the_fused_update_where_the_device_has_one():
    assert build_optimizer(nn.Linear(2, 2), lr=0.1).param_groups[0]["fused"]
    assert not build_optimizer(nn.Linear(2, 2, device="meta"), lr=0.1).param_groups[0]["fused"]


def test_unknown_name_is_refused_with_the_legal_ones():
    with pytest.raises(ValueError, match=r"optimizer.name = 'sgd': must be one of adamw"):
        build_optimizer(nn.Linear(2, 2), name="sgd", lr=0.1)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_skipped_step_leaves_no_trace(fused, norm):
    torch.manual_seed(5)
    model, twin = nn.Linear(5, 4), nn.Linear(5, 4)
    twin.load_state_dict(model.state_dict())
    optimizers = [build_optimizer(m, lr=0.1, fused=fused) for m in (model, twin)]
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
        assert torch.equal(p, q)
    assert not hasattr(optimizers[0], "found_inf")


@pytest.mark.gpu
def test_on_a_gpu_clipping_and_a_skipped_step_never_wait_for_the_device():
    torch.manual_seed(7)
    model = nn.Linear(64, 64, device="cuda")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, lr=0.1)
    model(torch.randn(8, 64, device="cuda")).square().sum().backward()
    model.weight.grad = torch.full_like(model.weight, float("nan"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        skipped = step_if_finite(optimizer, clip_gradients(model, 1.0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.param_groups[0]["fused"] and skipped.item() == 1
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
