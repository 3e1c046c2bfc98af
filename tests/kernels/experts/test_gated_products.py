"""The products with the gates in them against products and gates one by one: every gradient, borders, dropped rows."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from cases import assert_close, experts, forced
from torch import Tensor

from torchlinearmoe.kernels.experts import OPERATOR, gated
from torchlinearmoe.kernels.experts import triton as ours

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def compare(
    dtype: torch.dtype, tolerance: float, tiles: tuple[gated.Tile, gated.Tile], *shapes: dict[str, Any]
) -> None:
    """With the definition, which has float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gated, "INTO", tiles[0])
        patch.setattr(gated, "BACK", tiles[1])
        patch.setattr(gated, "takes", lambda x, hidden: True)
        calls: list[str] = []
        for name in ("into_gates", "back_through_gates"):
            real = getattr(gated, name)
            patch.setattr(gated, name, lambda *a, real=real, name=name, **k: (calls.append(name), real(*a, **k))[1])
        for shape in shapes:
            case = experts.routed(**shape).rounded(dtype)
            expected = forced(OPERATOR, "reference", lambda case=case: case.run("reference"))
            assert_close(forced(OPERATOR, "triton", lambda case=case: case.run("triton", dtype)), expected, tolerance)
        assert calls == ["into_gates", "back_through_gates"] * len(shapes)


SMALL = gated.Tile(rows=16, channels=64, inner=64, warps=4, stages=2)
SHAPES: tuple[dict[str, Any], ...] = (
    {"tokens": 23, "experts": 5, "top_k": 2, "width": 64, "hidden": 64},
    {"tokens": 31, "experts": 6, "top_k": 3, "width": 128, "hidden": 192, "busy": 4, "kept": 0.6, "strided": True},
)


def in_float32() -> None:
    torch.manual_seed(0)
    compare(torch.float32, 1e-5, (SMALL, SMALL), *SHAPES, {**SHAPES[0], "kept": 0.0})


def in_float16() -> None:
    torch.manual_seed(1)
    compare(torch.float16, 4e-3, (SMALL, SMALL), *SHAPES)


def as_they_are() -> None:
    """The tiles that a GPU gets; an expert with exactly one of them, one with a row more."""
    torch.manual_seed(2)
    shape = {"tokens": 140, "experts": 2, "top_k": 1, "width": 64, "hidden": 128}
    compare(torch.float16, 4e-3, (gated.INTO, gated.BACK), shape)


@needs_triton
@pytest.mark.parametrize("check", [in_float32, in_float16, as_they_are])
def test_gates_inside_products_equal_the_definition(interpreter: ProcessPoolExecutor, check) -> None:
    interpreter.submit(check).result()


def find_tiles() -> None:
    """Every row of an expert is in one tile of its own, whatever counts there are."""
    for counts in ([3, 5, 0, 1], [0, 0, 7], [2], [0], [4, 4, 0, 0], [1] * 40):
        offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
        rows = sum(counts) + 3  # some of no expert
        tiles = gated._tiles(offsets, rows, 2).tolist()
        start, expected = 0, []
        for expert, count in enumerate(counts):
            expected += [[expert, start + i] for i in range(0, count, 2)]
            start += count
        assert tiles[: len(expected)] == expected, counts
        assert all(expert == -1 for expert, _ in tiles[len(expected) :])


@needs_triton
def test_tiles_cover_the_rows_of_every_expert_once(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(find_tiles).result()


def unwritten() -> None:
    """Every new tensor is full of NaN, and of the largest number where it is of integers."""
    torch.use_deterministic_algorithms(True)
    try:
        torch.manual_seed(3)
        compare(torch.float32, 1e-5, (SMALL, SMALL), SHAPES[1])
    finally:
        torch.use_deterministic_algorithms(False)


@needs_triton
def test_memory_that_nobody_wrote_reaches_nothing(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(unwritten).result()


def which() -> list[bool]:
    def takes(dtype: torch.dtype, width: int, hidden: int, tokens: int = 3) -> bool:
        return gated.takes(torch.empty(tokens, width, dtype=dtype), hidden)

    half = torch.float16
    return [
        takes(half, 64, 192),
        takes(torch.float32, 64, 192),
        takes(half, 96, 192),
        takes(half, 64, 32),
        takes(half, 64, 64, tokens=0),
    ]


def test_only_whole_tiles_of_16_bits_are_taken() -> None:
    assert which() == [True, False, False, False, False]


@needs_triton
def test_a_loop_over_experts_stays_one(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(looped).result()


def looped() -> None:
    case = experts.routed(**SHAPES[0]).rounded(torch.float16)
    inputs: dict[str, Tensor] = {
        name: x if name in case.wide else x.to(torch.float16) for name, x in case.inputs.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gated, "into_gates", None)
        weights = inputs["weights_Tk"].float()
        x, gate_up, down = (inputs[name] for name in ("x_TD", "gate_up_EDF", "down_EFD"))
        assert ours.experts(x, case.options["ids_Tk"], weights, gate_up, down, None, "loop").shape == x.shape


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "shape",
    [
        {"tokens": 515, "experts": 160, "top_k": 6, "width": 2048, "hidden": 1408},
        {"tokens": 4096, "experts": 8, "top_k": 2, "width": 1024, "hidden": 896, "busy": 3},
        {"tokens": 700, "experts": 300, "top_k": 3, "width": 64, "hidden": 192, "kept": 0.6},
        {"tokens": 1, "experts": 8, "top_k": 2, "width": 128, "hidden": 64},
    ],
    ids=["A1B", "busy", "narrow", "token"],
)
def test_gates_inside_products_equal_the_definition_on_a_gpu(shape: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    case = experts.routed(**shape).rounded(dtype)
    if torch.cuda.get_device_capability() == (9, 0):
        assert gated.takes(torch.empty(1, shape["width"], dtype=dtype, device="cuda"), shape["hidden"])
    expected = forced(OPERATOR, "torch", lambda: case.run("torch", torch.float64, "cuda"))
    assert_close(forced(OPERATOR, "triton", lambda: case.run("triton", dtype, "cuda")), expected, 1e-2)
