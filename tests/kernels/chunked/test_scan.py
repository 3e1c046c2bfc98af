"""The scans over chunks equal the plain loop, however often they fold."""

import pytest
import torch

from torchlinearmoe.kernels.chunked.scan import scan_decay, scan_dense


@pytest.mark.parametrize("chunks", [1, 4, 5, 33, 80])
def test_decays_equal_the_plain_loop_with_every_gradient(chunks):
    torch.manual_seed(1)
    log_a = -torch.rand(1, 2, 3, chunks).double()
    log_a[..., ::7] = -torch.inf  # where a document begins
    inputs = [log_a.requires_grad_(), torch.randn(1, 2, 3, chunks, 4).double().requires_grad_()]

    def plain(log_a, b):
        states = [torch.zeros(1, 2, 3, 4).double()]
        for m in range(chunks - 1):
            states.append(log_a[..., m, None].exp() * states[-1] + b[..., m, :])
        return torch.stack(states, 3)

    compare(lambda log_a, b: scan_decay(log_a, b, radix=4), plain, inputs)


@pytest.mark.parametrize("chunks", [1, 2, 5, 33, 80])
def test_dense_transitions_equal_the_plain_loop_with_every_gradient(chunks):
    torch.manual_seed(2)
    a, b = torch.randn(1, 2, chunks, 4, 4).double() / 3, torch.randn(1, 2, chunks, 4, 5).double()
    inputs = [a.requires_grad_(), b.requires_grad_()]

    def plain(a, b):
        states = [torch.zeros(1, 2, 4, 5).double()]
        for m in range(chunks - 1):
            states.append(a[:, :, m] @ states[-1] + b[:, :, m])
        return torch.stack(states, 2)

    compare(lambda a, b: scan_dense(a, b, loop_below=2), plain, inputs)


def compare(scan, plain, inputs):
    states, expected = scan(*inputs), plain(*inputs)
    torch.testing.assert_close(states, expected)
    if expected.requires_grad:
        cotangent = torch.randn_like(states)
        found = torch.autograd.grad(states, inputs, cotangent)
        torch.testing.assert_close(found, torch.autograd.grad(expected, inputs, cotangent))
