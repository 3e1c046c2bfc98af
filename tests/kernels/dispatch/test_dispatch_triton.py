"""Our Triton dispatch: sorts of any size and number of experts, in blocks and tiles; operators of the compiler."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from torchlinearmoe.kernels.dispatch import plain
from torchlinearmoe.kernels.dispatch import triton as ours

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def compare(tokens: int, top_k: int, experts: int, drop: bool, device: str = "cpu") -> None:
    """All of what is sorted, with experts that nobody chose."""
    ids = torch.randint(0, max(1, experts - experts // 4), (tokens, top_k), device=device)
    keep = torch.rand(tokens, top_k, device=device) < 0.7 if drop else None
    order, inverse, counts, offsets = ours.sorted_rows(ids, experts, keep)
    assert all(torch.equal(a, b) for a, b in zip((order, inverse, counts), plain.sort(ids, experts, keep)))
    assert torch.equal(offsets, counts.cumsum(0).to(torch.int32))


def sizes() -> None:
    torch.manual_seed(0)
    for tokens, top_k, experts, drop in ((1, 1, 1, True), (100, 3, 40, False), (37, 2, 16, True), (40, 2, 300, True)):
        compare(tokens, top_k, experts, drop)
    with pytest.MonkeyPatch.context() as patch:  # several tiles a block, several rounds over the blocks' counts
        patch.setattr(ours, "BLOCKS", 5)
        patch.setattr(ours, "HOT", 64)
        compare(100, 2, 30, True)
        compare(103, 1, 7, False)


def test_assignments_are_sorted_as_by_a_stable_sort(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(sizes).result()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, top_k, experts", [(131072, 8, 64), (16384, 8, 256), (999, 6, 160), (3, 2, 8)])
@pytest.mark.parametrize("drop", [False, True])
def test_large_batches_are_sorted_as_by_a_stable_sort_on_a_gpu(
    tokens: int, top_k: int, experts: int, drop: bool
) -> None:
    torch.manual_seed(1)
    compare(tokens, top_k, experts, drop, "cuda")


def check_operators() -> None:
    """torch.library's own checks."""
    torch.manual_seed(2)
    ids = torch.randint(0, 3, (4, 2))
    order, inverse, _ = plain.sort(ids, 3, None)
    x, rows, weights = (torch.randn(*shape, requires_grad=True) for shape in ((4, 5), (8, 5), (4, 2)))
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    differentiable = (*checks, "test_autograd_registration")
    torch.library.opcheck(ours.sorted_rows, (ids, 3, torch.rand(4, 2) < 0.5), test_utils=checks)
    torch.library.opcheck(ours.spread, (x, order, inverse), test_utils=differentiable)
    torch.library.opcheck(ours.collect, (rows, order, inverse), test_utils=differentiable)
    torch.library.opcheck(ours.weighted_sum, (rows, weights, order, inverse), test_utils=differentiable)
    detached = (rows.detach(), weights.detach(), order, torch.randn(4, 5))
    torch.library.opcheck(ours.weighted_sum_backward, detached, test_utils=checks)


def test_the_operators_are_what_the_compiler_takes_them_for(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(check_operators).result()
