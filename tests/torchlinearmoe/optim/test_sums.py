"""Gradients of several micro-batches are their sum in float32, wherever its parts lie."""

import pytest
import torch
from torch import nn

from torchlinearmoe.optim import build_optimizer, step_if_finite, sums
from torchlinearmoe.optim.gradients import gradient_parts, summed
from torchlinearmoe.optim.masters import hold_masters, read_master
from torchlinearmoe.optim.sums import GradientSums, start_sums
from torchlinearmoe.parallel.clip import gradient_norm


def make(device: str = "cpu") -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 8)).to(device)
    hold_masters(model, torch.bfloat16)
    return model


def backward(model: nn.Module, seed: int, device: str) -> None:
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(seed)).bfloat16().to(device)
    model(x).float().square().sum().backward()


def alone(seeds: list[int], device: str) -> list[torch.Tensor]:
    """float32 sums of the gradients of one backward each."""
    model = make(device)
    total = [torch.zeros_like(p, dtype=torch.float32) for p in model.parameters()]
    for seed in seeds:
        model.zero_grad()
        backward(model, seed, device)
        total = [t + p.grad.float() for t, p in zip(total, model.parameters()) if p.grad is not None]
    return total


def check(micro_batches: int, large: int, device: str, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sums, "LARGE", large)
    model, seeds = make(device), list(range(micro_batches))
    collected, optimizer = GradientSums(model), build_optimizer(model, lr=0.1, eps=1.0)
    for step in range(2):  # nothing is left of the first step
        with collected.over(micro_batches):
            for seed in seeds:
                backward(model, seed, device)
                collected.collect()
        found = [parts for p in model.parameters() if (parts := gradient_parts(p)) is not None]
        expected = alone(seeds, device)
        for parts, gradient in zip(found, expected, strict=True):
            torch.testing.assert_close(summed(parts).float(), gradient, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(gradient_norm(model), nn.utils.get_total_norm(expected))
        if step == 0:
            optimizer.zero_grad()
    assert (micro_batches > 1 and large < 10**6) == any(earlier is not None for _, earlier in found)
    twin = make(device)
    other = build_optimizer(twin, lr=0.1, eps=1.0)
    for p, gradient in zip(twin.parameters(), expected):
        p.grad = gradient
    for module, each in ((model, optimizer), (twin, other)):
        step_if_finite(each, gradient_norm(module), 1.0)
        each.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(read_master(p), read_master(q), rtol=1e-6, atol=1e-6)
        assert gradient_parts(p) is None


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4])
@pytest.mark.parametrize("large", [1, 100, 10**6])
def test_parts_add_up(micro_batches: int, large: int, monkeypatch: pytest.MonkeyPatch):
    check(micro_batches, large, "cpu", monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4])
@pytest.mark.parametrize("large", [1, 100, 10**6])
def test_parts_add_up_on_a_gpu(micro_batches: int, large: int, monkeypatch: pytest.MonkeyPatch):
    check(micro_batches, large, "cuda", monkeypatch)


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4])
@pytest.mark.parametrize("large", [100, 10**6])
def test_bytes_held_are_those_told(micro_batches: int, large: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sums, "LARGE", large)
    model = make()
    collected = GradientSums(model)
    with collected.over(micro_batches):
        for seed in range(micro_batches):
            backward(model, seed, "cpu")
            collected.collect()
    for p in model.parameters():
        found = gradient_parts(p)
        assert found is not None
        held = sum(part.numel() * part.element_size() for part in found if part is not None)
        assert held == sums.held_bytes(p, micro_batches, in_parts=True)


def test_nothing_of_an_earlier_step_is_left(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sums, "LARGE", 1)
    model = make()
    collected = GradientSums(model)
    for micro_batches in (3, 1):
        model.zero_grad()  # torch's own, which knows nothing of parts
        with collected.over(micro_batches):
            for seed in range(micro_batches):
                backward(model, seed, "cpu")
                collected.collect()
    for p, gradient in zip(model.parameters(), alone([0], "cpu"), strict=True):
        parts = gradient_parts(p)
        assert parts is not None and torch.equal(summed(parts).float(), gradient)


def test_what_would_lose_masters_is_refused():
    model = make()
    with pytest.raises(RuntimeError, match="load_state_dict writes weights without their masters"):
        model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="casts moments"):
        build_optimizer(model, lr=0.1).load_state_dict({})


def test_who_adds_to_grad_itself_adds_in_float32():
    model = make()
    start_sums(model)
    for seed in (0, 1, 2):
        backward(model, seed, "cpu")
    for p, gradient in zip(model.parameters(), alone([0, 1, 2], "cpu"), strict=True):
        assert p.grad is not None and p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, gradient, rtol=1e-6, atol=1e-5)
