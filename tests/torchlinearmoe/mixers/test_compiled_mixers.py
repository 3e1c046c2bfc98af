"""The compiled regions of a mixer serve every batch with the graphs that the first one made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixer_cases import Case, make_stack
from torch._dynamo.testing import CompileCounterWithBackend

from torchlinearmoe.documents import Documents
from torchlinearmoe.parallel.compile import compile_regions


@pytest.mark.parametrize("name", ["hgrn2", pytest.param("gated_delta_net", marks=pytest.mark.slow), "mamba2"])
def test_batches_of_different_documents_make_no_new_graphs(name: str) -> None:
    torch.manual_seed(1)
    torch._dynamo.reset()
    compiled, eager = (make_stack(Case(name, {}), dtype=torch.float32) for _ in range(2))
    counter: Any = CompileCounterWithBackend("aot_eager")
    assert compile_regions(compiled, counter) == 4
    x, first = torch.randn(128, 64), 0
    for index in range(50):
        inside = torch.randperm(127)[: index % 16] + 1
        documents = Documents.packed([0, *sorted(inside.tolist()), 128])
        results = []
        for stack in (compiled, eager) if index % 10 == 9 else (compiled,):
            stack.zero_grad()
            y, _ = stack(x, stack.context(documents))
            y.square().sum().backward()
            results.append([y.detach(), *(p.grad for p in stack.parameters() if p.grad is not None)])
        for found, *expected in zip(*results, strict=True):
            assert all((found - y).norm() < 1e-3 * y.norm() for y in expected)
        first = first or counter.frame_count
    assert first > 0 and counter.frame_count == first
