"""Slot attention by our Triton kernels: more than what the generic comparison asks, interpreted."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from cases import Case, assert_close, forced
from cases.slots import case

from torchlinearmoe.kernels.linear import triton as linear
from torchlinearmoe.kernels.linear import walk

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def patched(case: Case, widest: int, group: int) -> dict[str, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "WIDEST", widest)
        patch.setattr(walk, "group_of", lambda places, longest=32: group)
        return forced(case.operator, "triton", lambda: case.run("triton", torch.float32))


@pytest.mark.parametrize(
    "lengths, widest, group", [((70, 0, 140), 128, 2), ((3, 20), 16, 16)], ids=["over stretches", "in parts"]
)
def test_documents_go_on_over_stretches_and_wide_heads_in_parts(
    interpreter: ProcessPoolExecutor, lengths: tuple[int, ...], widest: int, group: int
) -> None:
    torch.manual_seed(1)
    drawn = case(lengths, "in out", H=1, K=20, V=24)
    assert_close(interpreter.submit(patched, drawn, widest, group).result(), drawn.run("torch"), 1e-5)
