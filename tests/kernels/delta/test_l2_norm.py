"""The delta rule's own normalisation of queries and keys."""

import pytest
import torch
from torch.nn import functional as F

from torchlinearmoe.kernels.delta import delta_rule
from torchlinearmoe.segments import Segments

T, H, K, V = 9, 2, 16, 5
SEGMENTS = Segments.of_lengths((T,))


def test_lengths_of_queries_and_keys_do_not_matter():
    torch.manual_seed(1)
    q, k, v, beta = torch.randn(T, H, K), torch.randn(T, H, K), torch.randn(T, H, V), torch.rand(T, H)
    o, _ = delta_rule(q, k, v, beta, segments=SEGMENTS, l2_norm=True)
    longer, _ = delta_rule(3 * q, 7 * k, v, beta, segments=SEGMENTS, l2_norm=True)
    plain, _ = delta_rule(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta, segments=SEGMENTS)
    torch.testing.assert_close(o, longer, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(o, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_of_length_zero_write_nothing_and_have_finite_gradients(dtype):
    torch.manual_seed(1)
    q, k, v = (torch.randn(T, H, width).to(dtype).requires_grad_() for width in (K, K, V))
    present = (torch.arange(T) % 3 > 0).to(dtype).view(T, 1, 1)
    beta, initial = 2 * torch.rand(T, H), torch.randn(1, H, K, V)
    o, _ = delta_rule(q * present, k * present, v, beta, segments=SEGMENTS, l2_norm=True, initial_state=initial)
    gradients = torch.autograd.grad(o.float().square().sum(), (q, k, v))
    assert all(bool(x.isfinite().all()) for x in (o, *gradients))
    assert not o[::3].any() and not gradients[2][::3].any() and bool(gradients[2][1::3].any())
