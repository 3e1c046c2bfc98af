"""Sums of decays along a row are those of one long sum, forwards and backwards, with their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchlinearmoe.mixers.spanned import BLOCK, running_sums


@pytest.mark.parametrize("shape", [(2, 1, 3), (1, BLOCK, 2, 5), (2, BLOCK + 1, 3, 4), (2, 3 * BLOCK - 5, 1)], ids=str)
def test_sums_by_blocks_are_sums(shape: tuple[int, ...]) -> None:
    x, weights = torch.randn(2, *shape, dtype=torch.float64).unbind(0)
    x.requires_grad_()

    def compare(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected)
        gradients = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, expected))
        torch.testing.assert_close(*gradients)

    compare(running_sums(x), x.cumsum(1))
    compare(running_sums(x, reverse=True), x.flip(1).cumsum(1).flip(1))
