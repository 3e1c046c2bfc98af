"""The short convolution equals its definition, stops at document borders and compiles."""

import pytest
import torch
from torch.nn import functional as F

from torchlinearmoe.kernels import ops
from torchlinearmoe.kernels.reference.convolution import short_convolution as definition

LENGTHS = (1, 2, 0, 7, 4, 19, 0)


def random_inputs(N, B, T, W, D=5):
    x, weight, bias = torch.randn(B, T, D), torch.randn(D, W), torch.randn(D)
    return [tensor.double().requires_grad_() for tensor in (x, weight, bias, torch.randn(N, W - 1, D))]


def results(function, inputs, states, **options):
    """Output, final state and gradients."""
    x, weight, bias, state = (tensor.detach().clone().requires_grad_() for tensor in inputs)
    y, final = function(
        x, weight, bias, initial_state=state if "in" in states else None, output_final_state="out" in states, **options
    )
    loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
    if final is not None:
        loss = loss + (final * torch.linspace(1, 2, final.numel()).view_as(final)).sum()
    loss.backward()
    state_grad = state.grad if state.numel() else None
    return [y, final, x.grad, weight.grad, bias.grad, state_grad]


@pytest.mark.parametrize("states", ["", "in", "out", "in out"])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_equals_definition_with_every_gradient(states, width, packed, activation):
    torch.manual_seed(1)
    options: dict = {"activation": activation}
    if packed:
        inputs = random_inputs(len(LENGTHS), 1, sum(LENGTHS), width)
        options["cu_seqlens"] = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()
    else:
        inputs = random_inputs(2, 2, 2 if "in" in states else 11, width)
    for actual, expected in zip(
        results(ops.short_convolution, inputs, states, **options), results(definition, inputs, states, **options)
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_document_ids_alone_give_the_same_outputs_compiled():
    torch.manual_seed(2)
    x, weight, bias, _ = random_inputs(1, 1, 33, 4)
    ids = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    compiled = torch.compile(ops.short_convolution, fullgraph=True, backend="aot_eager")
    y, _ = compiled(x, weight, bias, activation="silu", document_ids=ids)
    y.sum().backward()
    cu_seqlens = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()
    other = x.detach().clone().requires_grad_()
    expected, _ = definition(other, weight, bias, activation="silu", cu_seqlens=cu_seqlens)
    expected.sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, other.grad)


def test_bf16_is_computed_in_fp32():
    torch.manual_seed(3)
    x, weight = torch.randn(1, 40, 6).bfloat16(), torch.randn(6, 4).bfloat16()
    y, state = ops.short_convolution(x, weight, activation="silu", output_final_state=True)
    expected, _ = definition(x.float(), weight.float(), activation="silu")
    assert y.dtype == torch.bfloat16
    assert state is not None and torch.equal(state, x[:, -3:])
    assert torch.equal(y, expected.bfloat16())
