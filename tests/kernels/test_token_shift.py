"""The token shift equals its definition, stops at document borders, steps and compiles."""

import pytest
import torch
from torch.nn import functional as F

from torchlinearmoe.kernels import ops, step
from torchlinearmoe.kernels.reference.token_shift import token_shift as definition

LENGTHS = (0, 1, 2, 0, 7, 1, 19, 0)


def results(function, x, state, cotangents, **options):
    """Output, final state, and the gradients of both by input and state."""
    x = x.clone().requires_grad_()
    state = None if state is None else state.clone().requires_grad_()
    y, final = function(x, initial_state=state, **options)
    loss = (y * cotangents[0]).sum()
    if final is not None:
        loss = loss + (final * cotangents[1]).sum()
    loss.backward()
    return [y, final, x.grad, None if state is None else state.grad]


@pytest.mark.parametrize("states", ["", "in", "out", "in out"])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_definition_with_every_gradient(states, packed):
    torch.manual_seed(1)
    B, T, N = (1, sum(LENGTHS), len(LENGTHS)) if packed else (3, 5, 3)
    options: dict = {"output_final_state": "out" in states}
    if packed:
        options["cu_seqlens"] = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()
    x, state = torch.randn(B, T, 4).double(), torch.randn(N, 1, 4).double() if "in" in states else None
    cotangents = torch.randn(B, T, 4).double(), torch.randn(N, 1, 4).double()
    for actual, expected in zip(
        results(ops.token_shift, x, state, cotangents, **options),
        results(definition, x, state, cotangents, **options),
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_document_ids_alone_give_the_same_outputs_compiled():
    torch.manual_seed(2)
    ids = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    x, weights = torch.randn(1, sum(LENGTHS), 4), torch.randn(1, sum(LENGTHS), 4)
    compiled = torch.compile(ops.token_shift, fullgraph=True, backend="aot_eager")
    cu_seqlens = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()
    actual = results(compiled, x, None, (weights, None), document_ids=ids)
    expected = results(definition, x, None, (weights, None), cu_seqlens=cu_seqlens)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_steps_equal_the_definition():
    torch.manual_seed(3)
    x, state = torch.randn(2, 4, 3).bfloat16(), torch.randn(2, 1, 3).bfloat16()
    expected, final = definition(x, initial_state=state, output_final_state=True)
    for t in range(4):
        y, state = step.token_shift_step(x[:, t], state)
        assert torch.equal(y, expected[:, t])
    torch.testing.assert_close(state, final, rtol=0, atol=0)


def test_wrong_shapes_are_refused_in_one_line():
    x = torch.randn(1, 4, 3)
    with pytest.raises(ValueError, match=r"initial_state: shape \(1, 3\), legal: \(1, 1, 3\)"):
        ops.token_shift(x, initial_state=torch.randn(1, 3))
    with pytest.raises(ValueError, match=r"document_ids: shape \(3,\), legal: \(4,\)"):
        ops.token_shift(x, document_ids=torch.zeros(3))
    with pytest.raises(ValueError, match="batch of 1, got 2"):
        ops.token_shift(torch.randn(2, 4, 3), cu_seqlens=torch.tensor([0, 4]))
