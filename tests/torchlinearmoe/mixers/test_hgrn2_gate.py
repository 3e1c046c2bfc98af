"""HGRN2's forget gate and lower bounds: the formula, its gradients, its extremes."""

from __future__ import annotations

import pytest
import torch

from torchlinearmoe.mixers.hgrn2 import LowerBounds, forget_gate

EXTREMES = [-1e3, -88.0, -60.0, -20.0, 0.0, 20.0, 60.0, 88.0, 1e3]


@pytest.mark.parametrize("gamma", [0.0, 1e-3, 0.5, 0.999])
def test_gate_and_key_and_their_gradients_follow_the_formula(gamma: float):
    x = torch.linspace(-20, 20, 81, dtype=torch.float64)
    cotangents = torch.randn(2, 81, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for gate in (forget_gate, _naive):
        logits = x.clone().requires_grad_()
        bound = torch.full_like(x, gamma).requires_grad_()
        log_f, key = gate(logits, bound)
        grads = torch.autograd.grad((cotangents[0] * log_f + cotangents[1] * key).sum(), (logits, bound))
        results.append((log_f.detach(), key.detach(), *grads))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def _naive(logits, bound):
    f = bound + (1 - bound) * torch.sigmoid(logits)
    return torch.log(f), 1 - f


@pytest.mark.parametrize("gamma", [0.0, 1e-6, 0.3, 0.999])
def test_float32_is_close_to_float64_and_finite_at_the_extremes(gamma: float):
    logits = torch.tensor(EXTREMES, requires_grad=True)
    bound = torch.full_like(logits, gamma).detach().requires_grad_()
    log_f, key = forget_gate(logits, bound)
    assert log_f.dtype == key.dtype == torch.float32
    f = gamma + (1 - gamma) * torch.sigmoid(logits.detach().double())
    # Below a logit of -60 a gate without a bound is held at e^-60.
    expected = torch.log(f.clamp(min=torch.sigmoid(torch.tensor(-60.0).double())))
    torch.testing.assert_close(log_f.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(key.double(), 1 - f, rtol=1e-4, atol=1e-7)
    assert bool((log_f <= 0).all()) and bool((key >= 0).all())
    (log_f + key).sum().backward()
    assert logits.grad is not None and bound.grad is not None
    assert bool(logits.grad.isfinite().all()) and bool(bound.grad.isfinite().all())


def test_without_a_bound_the_gate_is_a_sigmoid():
    logits = torch.randn(50, dtype=torch.float64)
    log_f, key = forget_gate(logits, None)
    torch.testing.assert_close(log_f.exp(), torch.sigmoid(logits))
    torch.testing.assert_close(key, 1 - torch.sigmoid(logits))
    half = forget_gate(logits.bfloat16(), None)
    assert half[0].dtype == half[1].dtype == torch.float32


def test_bounds_grow_from_zero_towards_one_with_depth():
    bounds = LowerBounds(5, 7)
    with torch.no_grad():
        bounds.table.zero_()
        torch.testing.assert_close(bounds(), torch.arange(5.0)[:, None].expand(5, 7) / 5)
        bounds.table.normal_()
        rows = bounds()
        shares = bounds.table.softmax(0)
        torch.testing.assert_close(rows, shares.cumsum(0) - shares[:1])
    assert bool((rows[0] == 0).all()) and bool((rows.diff(dim=0) > 0).all()) and float(rows.max()) < 1


def test_one_layer_has_a_zero_bound():
    bounds = LowerBounds(1, 3)
    with torch.no_grad():
        bounds.table.normal_()
    assert bounds().tolist() == [[0.0, 0.0, 0.0]]


def test_a_saturated_first_layer_does_not_spoil_the_tables_gradient():
    """The gradient by a zero bound is up to e^60; that bound is constant, so none of it may reach the table."""
    layers, width = 7, 16
    bounds = LowerBounds(layers, width).double()
    with torch.no_grad():
        bounds.table.normal_(generator=torch.Generator().manual_seed(1))
    logits = torch.randn(layers, width, generator=torch.Generator().manual_seed(2))

    def gradient(dtype: torch.dtype, first: float) -> torch.Tensor:
        module = LowerBounds(layers, width).to(dtype)
        module.load_state_dict(bounds.state_dict())
        saturated = logits.to(dtype).clone()
        saturated[0] = first
        log_f, key = forget_gate(saturated, module())
        (log_f + key).sum().backward()
        assert module.table.grad is not None
        return module.table.grad

    expected = gradient(torch.float64, 0.0)
    for first in (-1e3, -30.0, -16.0, -14.0, -12.0, 0.0, 1e3):
        torch.testing.assert_close(gradient(torch.float32, first).double(), expected, rtol=1e-4, atol=1e-6)
