"""Our Triton kernels compile, and their tiles fit, on chips that this machine does not have.

The interpreter takes what the compiler refuses: a name that changes its shape in a loop, a constant that is none.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from cases import forced
from cases.families import FAMILIES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
]
CHIPS = {"A100": (80, 166912), "RTX 4090": (89, 101376), "H100": (90, 232448)}
"""Capability and bytes of shared memory a block."""


def compile_families(chip: str, kinds: tuple[str, ...], K: int) -> list[str]:
    """Forward and backward of every kind, with and without states, at the width of models."""
    from fake_gpu import FakeGPU

    gpu = FakeGPU(*CHIPS[chip]).install()
    for kind in kinds:
        for states in ("", "in out"):
            case = FAMILIES[kind]((1100, 30), states, H=1, K=K, V=128)
            forced(case.operator, "triton", lambda case=case: case.run("triton", torch.bfloat16))
    return gpu.compiled


def names(chip: str, *kinds: str, K: int = 128) -> set[str]:
    """Of the kernels of these kinds."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # Triton keeps its driver
        return set(pool.submit(compile_families, chip, kinds, K).result())


@pytest.mark.parametrize("chip", CHIPS)
def test_linear_recurrences_compile_for(chip: str) -> None:
    expected = {"summarize", "join", "walk", "decay_gradients", "cumulate", "prepare_channels", "channel_gradients"}
    found = names(chip, "identity", "scalar", "diagonal", "bonus", "slots")
    assert expected | {"passing_of_chunks"} <= found


@pytest.mark.parametrize("chip", CHIPS)
def test_quadratic_attention_compiles_for(chip: str) -> None:
    expected = {"written", "join", "outputs", "products_of_outputs", "gradients"}
    assert names(chip, "taylor", K=16) == expected
