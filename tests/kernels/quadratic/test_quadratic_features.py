"""Second-order features have the inner product that they promise."""

import pytest
import torch

from torchlinearmoe.kernels.quadratic.definition import second_order_features
from torchlinearmoe.kernels.quadratic.features import KINDS, QuadraticFeatures, feature_width


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 2, 16])
def test_the_promised_inner_product_and_gradient(kind, width):
    torch.manual_seed(0)
    q, k = torch.randn(2, 5, width).double().unbind(0)
    phi = QuadraticFeatures(kind, width, 0.3, q.device)
    s = 0.3 * (q * k).sum(-1)
    expected = 1 + s + s**2 / 2 if kind == "taylor" else s**2
    torch.testing.assert_close((phi.features(q) * phi.features(k)).sum(-1), expected)
    torch.testing.assert_close(phi.score((q * k).sum(-1)), expected)
    products = (q * k).sum(-1).requires_grad_()
    (slope,) = torch.autograd.grad(phi.score(products).sum(), products)
    torch.testing.assert_close(phi.slope(products), slope)
    root = 0.3**0.5
    torch.testing.assert_close(phi.features(q), second_order_features(root * q, kind))
    assert phi.features(q).shape[-1] == phi.count == feature_width(kind, width)
    x, cotangent = q.clone().requires_grad_(), torch.randn(5, phi.count).double()
    (naive,) = torch.autograd.grad((second_order_features(root * x, kind) * cotangent).sum(), x)
    torch.testing.assert_close(phi.gradient(q, cotangent), naive)


def test_sixteen_channels_make_153_and_136_features():
    assert feature_width("taylor", 16) == 153
    assert feature_width("square", 16) == 136
