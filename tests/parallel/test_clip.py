"""The norm on one process: against torch's own. Several ranks and meshes: tests/distributed/test_clip_on_meshes.py.

What the optimizer makes of it: tests/torchlinearmoe/optim/test_optimizer.py."""

import pytest
import torch
from torch import nn

from torchlinearmoe.parallel.clip import gradient_norm


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def twins(seed, dtype=torch.float32, scale=1.0):
    """Two equal models with equal gradients."""
    torch.manual_seed(seed)
    models = [nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for p, q in zip(*(m.parameters() for m in models)):
        p.grad = torch.randn_like(p) * scale
        q.grad = p.grad.clone()
    return models


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_norm_is_that_of_torch_and_gradients_stay(dtype, scale):
    ours, theirs = twins(11, dtype, scale)
    norm = gradient_norm(ours)
    assert norm.dtype == dtype and norm.shape == ()
    torch.testing.assert_close(norm, nn.utils.get_total_norm(gradients(theirs)))
    assert all(torch.equal(p, q) for p, q in zip(gradients(ours), gradients(theirs), strict=True))


def test_low_precision_gradients_are_summed_in_float32():
    parameter = nn.Parameter(torch.zeros(1 << 16, dtype=torch.bfloat16))
    parameter.grad = torch.full_like(parameter, 0.125)
    norm = gradient_norm([parameter])
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(32.0, rel=1e-6)


def test_parameters_without_gradient_or_frozen_count_as_zero():
    with_gradient, without, frozen = (nn.Parameter(torch.randn(3)) for _ in range(3))
    with_gradient.grad = torch.tensor([3.0, 0.0, 4.0])
    frozen.requires_grad_(False)
    frozen.grad = torch.ones(3)
    assert gradient_norm([without, with_gradient, frozen]).item() == pytest.approx(5.0)
    assert without.grad is None and torch.equal(frozen.grad, torch.ones(3))


def test_parameter_counted_elsewhere_is_not_counted():
    own, shared = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    own.grad, shared.grad = torch.tensor([6.0, 8.0]), torch.tensor([100.0])
    assert gradient_norm([own, shared], counted_elsewhere=[shared]).item() == pytest.approx(10.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_gradient_shows_in_the_norm(value):
    ours, _ = twins(13)
    gradients(ours)[0][0, 0] = value
    assert not torch.isfinite(gradient_norm(ours))


def test_generator_of_parameters_is_accepted():
    ours, theirs = twins(14, scale=30.0)
    torch.testing.assert_close(gradient_norm(ours.parameters()), gradient_norm(theirs))
