"""Merged blocks solve the triangular systems of the delta rules."""

import pytest
import torch

from torchlinearmoe.kernels.chunked.solve import solve_unit_lower


@pytest.mark.parametrize("size", [1, 8, 16, 64])
def test_equals_substitution_with_every_gradient(size):
    torch.manual_seed(1)
    lower = torch.randn(2, 3, size, size).double() / size**0.5
    inputs = [lower.requires_grad_(), torch.randn(2, 3, size, 5).double().requires_grad_()]
    cotangent = torch.randn_like(inputs[1])

    def plain(lower, right):
        return torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)

    solution, expected = solve_unit_lower(*inputs), plain(*inputs)
    torch.testing.assert_close(solution, expected)
    found = torch.autograd.grad(solution, inputs, cotangent)
    torch.testing.assert_close(found, torch.autograd.grad(expected, inputs, cotangent))
