"""Our Triton token shift: every row of any stride, an operator of the compiler; interpreted."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from cases import forced, token_shift
from cases.recurrences import AWKWARD

from torchlinearmoe.kernels.token_shift import OPERATOR
from torchlinearmoe.kernels.token_shift import triton as ours
from torchlinearmoe.segments import Segments

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def awkward_streams(states: str) -> None:
    torch.manual_seed(1)
    case = token_shift.case(AWKWARD, states, D=ours.CHANNELS + 3).rounded(torch.float32)
    found = forced(OPERATOR, "triton", lambda: case.run("triton", torch.float32))
    expected = forced(OPERATOR, "reference", lambda: case.run("reference"))
    for name in expected:
        # A copy is exact; the token that a final state also shows gets two gradients.
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("states", ["", "in out"])
def test_equals_the_definition_at_every_border(interpreter: ProcessPoolExecutor, states: str) -> None:
    interpreter.submit(awkward_streams, states).result()


def laid_out() -> None:
    torch.manual_seed(2)
    wide, segments = torch.randn(20, 9), Segments.of_lengths((13, 7))
    for x in (wide[:, 2:8], wide[::2].repeat_interleave(2, 0), wide.t().contiguous().t(), wide[:1].expand(20, 9)):
        outputs = []
        for z in (x, x.contiguous()):
            leaf = z.detach().requires_grad_()
            y, _ = ours.token_shift(leaf, segments, None, False)
            outputs.append((y, *torch.autograd.grad(y, leaf, x)))
        assert all(torch.equal(found, expected) for found, expected in zip(*outputs, strict=True))


def test_rows_of_any_stride(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(laid_out).result()


def kept() -> None:
    x, segments, kept = torch.randn(20, 6).requires_grad_(), Segments.of_lengths((13, 7)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda z: kept.append(z.data_ptr()), lambda z: z):
        ours.token_shift(x, segments, None, False)
    assert set(kept) == {segments.ids.data_ptr(), segments.borders.data_ptr()}


def test_nothing_is_kept_but_the_documents(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(kept).result()


def check_operator() -> None:
    """torch.library's own checks: schema, fake tensors, autograd, the compiler's view of it."""
    segments = Segments.of_lengths((3, 0, 2))
    for initial in (None, torch.randn(3, 2).requires_grad_()):
        x = torch.randn(5, 2).requires_grad_()
        torch.library.opcheck(ours.shift, (x, initial, segments.ids, segments.borders, False))


def test_the_operator_is_what_the_compiler_takes_it_for(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(check_operator).result()


@pytest.mark.gpu
def test_long_streams_in_bfloat16_on_a_gpu() -> None:
    torch.manual_seed(3)
    case = token_shift.case((*range(201), 9000), "in out", D=1000).rounded(torch.bfloat16)
    found = forced(OPERATOR, "triton", lambda: case.run("triton", torch.bfloat16, "cuda"))
    expected = forced(OPERATOR, "torch", lambda: case.run("torch", torch.bfloat16, "cuda"))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=2e-2, atol=2e-2)
