"""A grouped linear layer is one linear layer a group."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchlinearmoe.initialize import initialize, linear
from torchlinearmoe.moe.grouped_linear import GroupedLinear

INPUTS, COUNTS = 12, (5, 0, 3, 1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("outputs, bias", [(8, False), (3, True), (1, True)])
def test_equals_a_layer_a_group_in_outputs_and_gradients(dtype, tolerance: float, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = GroupedLinear(linear(INPUTS, outputs, 0.02, bias), len(COUNTS)).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x_RM = torch.randn(sum(COUNTS), INPUTS, dtype=dtype, requires_grad=True)
    direction_RN = torch.randn(sum(COUNTS), outputs, dtype=dtype)
    tensors = [x_RM, *layer.parameters()]
    y_RN = layer(x_RM, torch.tensor(COUNTS))
    expected_RN = torch.cat(
        [
            part @ layer.weight[:, e].T + (0 if layer.bias is None else layer.bias[:, e])
            for e, part in enumerate(x_RM.split(COUNTS))
        ]
    )
    torch.testing.assert_close(y_RN, expected_RN, rtol=tolerance, atol=tolerance)
    found, expected = (_gradients(y, direction_RN, tensors) for y in (y_RN, expected_RN))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def _gradients(y: Tensor, direction: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad((y * direction).sum(), tensors, retain_graph=True)


def test_groups_start_from_values_like_the_layers_and_unlike_each_other() -> None:
    layer = GroupedLinear(linear(64, 128, 0.3, bias=True), 4)
    initialize(layer, 0)
    assert layer.bias is not None and bool((layer.bias == 0).all())
    deviations = layer.weight.std((0, 2))
    torch.testing.assert_close(deviations, torch.full((4,), 0.3), rtol=0.05, atol=0)
    assert not torch.equal(layer.weight[:, 0], layer.weight[:, 1])
