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


LINEAR = ("identity", "scalar", "diagonal", "bonus", "slots")
DELTAS = ("delta", "gated_delta", "kda")


def compile_families(chip: str, kinds: tuple[str, ...]) -> list[str]:
    """Forward and backward of every kind, with and without states, at the width of models."""
    from fake_gpu import FakeGPU

    gpu = FakeGPU(*CHIPS[chip]).install()
    for kind in kinds:
        for states in ("", "in out"):
            case = FAMILIES[kind]((1100, 30), states, H=1, K=128, V=128)
            forced(case.operator, "triton", lambda case=case: case.run("triton", torch.bfloat16))
    return gpu.compiled


def compiled(chip: str, kinds: tuple[str, ...]) -> set[str]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # Triton keeps its driver
        return set(pool.submit(compile_families, chip, kinds).result())


def compile_dplr(chip: str) -> list[str]:
    """As RWKV7 calls it and without a bound, with and without states, over stretches."""
    from fake_gpu import FakeGPU

    gpu = FakeGPU(*CHIPS[chip]).install()
    for states, bound in (("", -0.6065306597126334), ("in out", None)):
        case = FAMILIES["dplr"]((1100, 30), states, H=1, K=128, V=128)
        case.options["lower_bound"] = bound
        forced(case.operator, "triton", lambda case=case: case.run("triton", torch.bfloat16))
    return gpu.compiled


@pytest.mark.parametrize("chip", CHIPS)
def test_dplr_compiles_for(chip: str) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        names = pool.submit(compile_dplr, chip).result()
    expected = {"score", "invert_blocks", "merge_blocks", "spread", "walk", "join", "output", "pair_gradients"}
    assert expected | {"channel_gradients"} <= set(names)


@pytest.mark.parametrize("chip", CHIPS)
def test_linear_recurrences_compile_for(chip: str) -> None:
    names = compiled(chip, LINEAR)
    expected = {"summarize", "join", "walk", "decay_gradients", "cumulate", "prepare_channels", "channel_gradients"}
    assert expected | {"passing_of_chunks"} <= names


@pytest.mark.parametrize("chip", CHIPS)
def test_delta_rules_compile_for(chip: str) -> None:
    expected = {
        "prepare",
        "prepare_channels",
        "invert",
        "cumulate",
        "onward",
        "back",
        "join",
        "pair_gradients",
        "gradients",
    }
    assert expected | {"decay_gradients", "channel_gradients"} <= compiled(chip, DELTAS)
