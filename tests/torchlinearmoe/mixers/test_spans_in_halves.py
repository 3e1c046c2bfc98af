"""Spans by our kernels, between whose two halves states pass from rank to rank, equal the whole: interpreted."""

from __future__ import annotations

import dataclasses
import importlib.util
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from mixer_cases import Case, Stack, make_stack, random_inputs, relative
from spans_in_turn import in_turn
from torch import Tensor

from torchlinearmoe.documents import Documents
from torchlinearmoe.kernels import delta, dplr, linear, slots
from torchlinearmoe.kernels.linear import walk
from torchlinearmoe.spans import cut_spans

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

BORDERS = {
    # A document over a border of two spans, and one that begins there; then a row of a single document.
    "few tokens": (140, [0, 1, 70, 100, 140, 280]),
    # The same over several stretches of two chunks.
    "two rows": (280, [0, 1, 145, 230, 280, 560]),
    "one document": (520, [0, 520]),
    # A document through whole spans of four, that ends with a token.
    "four spans": (300, [0, 20, 226, 300]),
}
CASES = [
    Case("linear_attention", {}),
    Case("retention", {"expand_v": 5.0}),  # values in two parts
    Case("mamba2", {}),
    Case("hgrn2", {}),
    Case("rwkv6", {}),
    Case("gsa", {}),
    Case("delta_net", {}),
    Case("gated_delta_net", {"heads": 2, "head_dim": 16, "value_heads": 4}),
    Case("kda", {}),
    Case("rwkv7", {}),
]
Results = dict[str, Tensor]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process of its own: Triton reads once, when it is imported, whether it interprets."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            assert pool.submit(os.getenv, "TRITON_INTERPRET").result() == "1"
        yield pool


def results_of(stack: Stack, y_TD: Tensor, x_TD: Tensor) -> Results:
    named = {"inputs": x_TD, **dict(stack.named_parameters())}
    weights_TD = random_inputs(len(y_TD), 3)
    gradients = torch.autograd.grad((y_TD.double() * weights_TD).sum(), list(named.values()))
    return {"output": y_TD.detach(), **dict(zip(named, gradients, strict=True))}


def spanned_run(case: Case, layout: str, size: int) -> Results:
    """By the kernels, in float32, with stretches of two chunks."""
    row, borders = BORDERS[layout]
    stack = make_stack(case, dtype=torch.float32, kernel_backend="triton")
    x_TD = random_inputs(borders[-1], dtype=torch.float32).requires_grad_()

    def run(group) -> Tensor:
        spans = cut_spans(borders, row, group)
        own_TD = x_TD.view(-1, size, spans.length, x_TD.shape[-1])[:, spans.rank].flatten(0, 1)
        documents = Documents.packed(spans.borders, spans.length, "cpu", spans)
        return stack(own_TD, stack.context(documents, spans.positions))[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "group_of", lambda places, longest=32: 2)
        for operator in (linear.OPERATOR, delta.OPERATOR, dplr.OPERATOR, slots.OPERATOR):
            backends = operator.find_backends()
            patch.setitem(backends, "triton", dataclasses.replace(backends["triton"], devices=None))
        parts = in_turn(size, run, patch)
        y_TD = torch.stack([part.unflatten(0, (-1, row // size)) for part in parts], 1).flatten(0, 2)
        return results_of(stack, y_TD, x_TD)


def whole_run(case: Case, layout: str) -> Results:
    row, borders = BORDERS[layout]
    stack, x_TD = make_stack(case), random_inputs(borders[-1]).requires_grad_()
    return results_of(stack, stack(x_TD, stack.context(Documents.packed(borders, row)))[0], x_TD)


def check(interpreter: ProcessPoolExecutor, case: Case, layout: str, size: int) -> None:
    found = interpreter.submit(spanned_run, case, layout, size).result()
    expected = whole_run(case, layout)
    errors = {name: relative(found[name], expected[name]) for name in expected}
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < 1e-4, errors


def test_few_tokens_in_halves_equal_the_whole(interpreter: ProcessPoolExecutor) -> None:
    check(interpreter, Case("hgrn2", {}), "few tokens", 2)


@pytest.mark.slow
@pytest.mark.parametrize("layout, size", [("two rows", 2), ("one document", 2), ("four spans", 4)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_spans_in_halves_equal_the_whole(interpreter: ProcessPoolExecutor, case: Case, layout: str, size: int) -> None:
    check(interpreter, case, layout, size)
