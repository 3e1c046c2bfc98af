"""The launches over all tensors of a kind equal the definition, type by type."""

import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from update_cases import norms_and_sums, run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

KINDS = {
    "halves": (True, torch.bfloat16, None, torch.float32, False),
    "halves, summed gradients": (True, torch.float32, None, torch.float32, False),
    "halves, gradients of two": (True, torch.bfloat16, torch.bfloat16, torch.float32, False),
    "halves, gradients of many": (True, torch.bfloat16, torch.float32, torch.float32, False),
    "halves, rounded moments": (True, torch.bfloat16, None, torch.bfloat16, False),
    "float32": (False, torch.float32, None, torch.float32, False),
    "float32, rounded moments of a shard": (False, torch.float32, None, torch.bfloat16, True),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture(scope="module")
def interpret() -> Iterator[Callable[..., Any]]:
    """Calls in a process of their own: Triton reads once, when it is imported, whether it interprets."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            assert pool.submit(os.getenv, "TRITON_INTERPRET").result() == "1"  # the process has started
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def check(errors: dict[str, float], rounded: bool) -> None:
    # A rounding by chance may fall otherwise where the number itself differs in its last bits.
    assert errors["master"] < (1e-5 if rounded else 1e-6), errors
    assert max(errors["exp_avg"], errors["exp_avg_sq"]) < (1e-4 if rounded else 1e-6), errors
    assert not rounded or errors["rounded otherwise"] < 1e-3, errors


@every_kind
def test_one_launch_updates_like_the_definition(interpret: Callable[..., Any], kind: Any):
    check(interpret(run, *kind, "cpu"), rounded=kind[3] == torch.bfloat16)


def test_norms_and_sums_over_all_tensors(interpret: Callable[..., Any]):
    assert max(interpret(norms_and_sums, "cpu")) < 1e-6


@pytest.mark.gpu
@every_kind
def test_one_launch_updates_like_the_definition_on_a_gpu(kind: Any):
    check(run(*kind, device="cuda"), rounded=kind[3] == torch.bfloat16)


@pytest.mark.gpu
def test_norms_and_sums_over_all_tensors_on_a_gpu():
    assert max(norms_and_sums("cuda")) < 1e-6
