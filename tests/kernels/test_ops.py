"""The operators pick a backend, say so once, and refuse inputs in one line."""

import logging

import pytest
import torch

from torchlinearmoe.kernels import ops
from torchlinearmoe.kernels.backends import choose


def inputs(B=1, T=4, H=2, K=3, V=5):
    return torch.randn(B, T, H, K), torch.randn(B, T, H, K), torch.randn(B, T, H, V)


def test_auto_is_said_once_per_operator(caplog, monkeypatch):
    monkeypatch.setattr(choose, "_chosen", {})
    q, k, v = inputs()
    with caplog.at_level(logging.INFO, logger="torchlinearmoe.kernels"):
        ops.linear_recurrence(q, k, v)
        ops.linear_recurrence(q, k, v)
        ops.delta_rule(q, k, v, torch.rand(1, 4, 2))
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(":")[0] for line in said] == [
        "identity runs on the torch backend",
        "delta runs on the torch backend",
    ]
    assert {name: backend for name, (backend, _) in ops.chosen_backends().items()} == {
        "identity": "torch",
        "delta": "torch",
    }


def test_scale_defaults_to_one_over_root_of_the_key_dim():
    q, k, v = inputs()
    for backend in ("torch", "reference"):
        default, _ = ops.linear_recurrence(q, k, v, backend=backend)
        scaled, _ = ops.linear_recurrence(q, k, v, scale=2.0, backend=backend)
        torch.testing.assert_close(default * 2 * 3**0.5, scaled)


def test_l2_norm_makes_queries_and_keys_scale_free():
    q, k, v = inputs(K=16)
    beta = torch.rand(1, 4, 2)
    o, _ = ops.delta_rule(q, k, v, beta, l2_norm=True)
    longer, _ = ops.delta_rule(3 * q, 7 * k, v, beta, l2_norm=True)
    torch.testing.assert_close(o, longer, rtol=1e-4, atol=1e-5)
    unit = torch.nn.functional.normalize
    plain, _ = ops.delta_rule(unit(q, dim=-1), unit(k, dim=-1), v, beta)
    torch.testing.assert_close(o, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_of_length_zero_write_nothing_and_have_finite_gradients(dtype):
    torch.manual_seed(1)
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs(T=9, K=16))
    present = (torch.arange(9) % 3 > 0).to(dtype).view(1, 9, 1, 1)
    beta, initial = 2 * torch.rand(1, 9, 2), torch.randn(1, 2, 16, 5)
    o, _ = ops.delta_rule(q * present, k * present, v, beta, l2_norm=True, initial_state=initial)
    gradients = torch.autograd.grad(o.float().square().sum(), (q, k, v))
    assert all(bool(x.isfinite().all()) for x in (o, *gradients))
    assert not o[:, ::3].any() and not gradients[2][:, ::3].any() and bool(gradients[2][:, 1::3].any())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"backend": "cuda"}, "model.kernel_backend = 'cuda': legal: auto, torch, reference, fla, mamba_ssm"),
        ({"log_decay": torch.zeros(3)}, "log_decay: shape (3,)"),
        ({"bonus": torch.zeros(2, 3)}, "bonus: needs log_decay per channel"),
        ({"bonus": torch.zeros(3)}, "bonus: shape (3,), legal: (2, 3)"),
        ({"initial_state": torch.zeros(2, 2, 3, 5)}, "initial_state: shape (2, 2, 3, 5), legal: (1, 2, 3, 5)"),
        ({"document_ids": torch.zeros(3)}, "document_ids: shape (3,), legal: (4,)"),
        ({"document_ids": torch.zeros(4), "output_final_state": True}, "states in or out need cu_seqlens"),
    ],
)
def test_linear_recurrence_refuses_in_one_line(options, message):
    with pytest.raises(ValueError) as error:
        ops.linear_recurrence(*inputs(), **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_packed_documents_need_a_batch_of_one():
    with pytest.raises(ValueError, match="batch of 1, got 2"):
        ops.linear_recurrence(*inputs(B=2), cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="batch of 1, got 2"):
        ops.short_convolution(torch.randn(2, 4, 3), torch.randn(3, 4), cu_seqlens=torch.tensor([0, 4]))


def test_delta_rule_refuses_in_one_line():
    q, k, _ = inputs()
    with pytest.raises(ValueError, match="v: 3 value heads, legal: a multiple of the 2 query heads"):
        ops.delta_rule(q, k, torch.randn(1, 4, 3, 5), torch.rand(1, 4, 3))
    with pytest.raises(ValueError, match="beta: shape"):
        ops.delta_rule(q, k, torch.randn(1, 4, 2, 5), torch.rand(1, 4))
    with pytest.raises(ValueError, match=r"log_decay: shape \(1, 4, 2, 5\), legal: \(1, 4, 2\), \(1, 4, 2, 3\)$"):
        ops.delta_rule(q, k, torch.randn(1, 4, 2, 5), torch.rand(1, 4, 2), torch.zeros(1, 4, 2, 5))


def test_dplr_rule_refuses_in_one_line():
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"b: shape \(1, 4, 2\), legal: \(1, 4, 2, 3\)"):
        ops.dplr_rule(q, k, v, k, torch.rand(1, 4, 2), -torch.rand(1, 4, 2, 3))
    with pytest.raises(ValueError, match="lower_bound: 0.0, legal: None, numbers below 0"):
        ops.dplr_rule(q, k, v, k, k, -torch.rand(1, 4, 2, 3), lower_bound=0.0)


def test_short_convolution_refuses_in_one_line():
    with pytest.raises(ValueError, match="activation: 'relu', legal: None, 'silu'"):
        ops.short_convolution(torch.randn(1, 4, 3), torch.randn(3, 4), activation="relu")
    with pytest.raises(ValueError, match="weight: shape"):
        ops.short_convolution(torch.randn(1, 4, 3), torch.randn(4, 4))
