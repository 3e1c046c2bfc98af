"""The halved sums of slot scores equal the sums that they stand for."""

import torch

from torchlinearmoe.kernels.slots.chunked import halved_sums


def test_every_token_and_both_ends():
    torch.manual_seed(7)
    products, w, a = torch.randn(3, 16, 16).double(), torch.randn(3, 16, 5).double(), torch.rand(3, 16, 5).double()
    sums, since, until = halved_sums(products, w, a)
    for t in range(16):
        terms = [products[:, t, s, None] * w[:, s] * a[:, s + 1 : t + 1].prod(1) for s in range(t + 1)]
        torch.testing.assert_close(sums[:, t], torch.stack(terms).sum(0))
        torch.testing.assert_close(since[:, t], a[:, : t + 1].prod(1))
        torch.testing.assert_close(until[:, t], w[:, t] * a[:, t + 1 :].prod(1))
