"""Our Triton kernels compile, and their tiles fit, on chips that this machine does not have.

The interpreter takes what the compiler refuses: a name that changes its shape in a loop, a constant that is none.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from cases import cases_of, forced
from cases.families import FAMILIES

from torchlinearmoe.kernels.operator import operators
from torchlinearmoe.segments import Segments

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
]
CHIPS = {"A100": (80, 166912), "RTX 4090": (89, 101376), "H100": (90, 232448)}
"""Capability and bytes of shared memory a block."""
EXTREMES = ("RTX 4090", "H100")
"""The least shared memory with the products of an A100, and the most with a Hopper's own."""


def compile_families(
    chip: str, kinds: tuple[str, ...], K: int, V: int = 128, dtype: torch.dtype = torch.bfloat16
) -> list[str]:
    """Forward and backward of every kind, with and without states. A kernel that takes more shared memory than a block
    has is an error."""
    from fake_gpu import FakeGPU

    gpu = FakeGPU(*CHIPS[chip]).install()
    for kind in kinds:
        for states in ("", "in out"):
            case = FAMILIES[kind]((1100, 30), states, H=1, K=K, V=V)
            forced(case.operator, "triton", lambda case=case: case.run("triton", dtype))
    return gpu.compiled


def names(chip: str, *kinds: str, K: int = 128, V: int = 128, dtype: torch.dtype = torch.bfloat16) -> set[str]:
    """Of the kernels of these kinds."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # Triton keeps its driver
        return set(pool.submit(compile_families, chip, kinds, K, V, dtype).result())


def compile_dplr(chip: str) -> list[str]:
    """As RWKV7 calls it and without a bound, with and without states, over stretches."""
    from fake_gpu import FakeGPU

    gpu = FakeGPU(*CHIPS[chip]).install()
    for states, bound in (("", -0.6065306597126334), ("in out", None)):
        case = FAMILIES["dplr"]((1100, 30), states, H=1, K=128, V=128)
        case.options["lower_bound"] = bound
        forced(case.operator, "triton", lambda case=case: case.run("triton", torch.bfloat16))
    return gpu.compiled


@pytest.mark.parametrize("chip", ["H100"])
def test_dplr_compiles_for(chip: str) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        names = pool.submit(compile_dplr, chip).result()
    expected = {"score", "invert_blocks", "merge_blocks", "spread", "walk", "join", "output", "pair_gradients"}
    assert expected | {"channel_gradients"} <= set(names)


def compile_cases(chip: str, operator: str, dtype: torch.dtype) -> list[str]:
    """Every width, stream and kind of the generic comparison; what does not fit the chip's shared memory raises."""
    from cases import cases_of
    from fake_gpu import FakeGPU

    from torchlinearmoe.kernels.operator import operators

    gpu = FakeGPU(*CHIPS[chip]).install()
    for draw in cases_of(operators()[operator]):
        case = draw()
        forced(case.operator, "triton", lambda case=case: case.run("triton", dtype))
    return gpu.compiled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", ["dplr", "quadratic"])
def test_every_case_fits(operator: str, dtype: torch.dtype) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(compile_cases, "H100", operator, dtype).result()


@pytest.mark.parametrize("chip", EXTREMES)
def test_linear_recurrences_compile_for(chip: str) -> None:
    expected = {"summarize", "join", "walk", "decay_gradients", "cumulate", "prepare_channels", "channel_gradients"}
    found = names(chip, "identity", "scalar", "diagonal", "bonus", "slots")
    assert expected | {"passing_of_chunks"} <= found


@pytest.mark.parametrize("chip", EXTREMES)
def test_state_space_duality_compiles_for(chip: str) -> None:
    assert {"measure", "advance", "join", "walk", "gradients", "steps", "finish"} == names(chip, "ssd", V=64)


@pytest.mark.parametrize("K, V, dtype", [(24, 40, torch.bfloat16), (256, 200, torch.float32)], ids=["narrow", "wide"])
def test_state_space_duality_fits_a_hopper(K: int, V: int, dtype: torch.dtype) -> None:
    assert {"walk", "gradients"} <= names("H100", "ssd", K=K, V=V, dtype=dtype)


@pytest.mark.parametrize("chip", ["H100"])
def test_delta_rules_compile_for(chip: str) -> None:
    expected = {
        "prepare",
        "prepare_channels",
        "invert",
        "spread",
        "cumulate",
        "onward",
        "back",
        "join",
        "pair_gradients",
        "gradients",
    }
    assert expected | {"measure", "sum_tiles", "channel_gradients"} <= names(chip, "delta", "gated_delta", "kda")


@pytest.mark.parametrize(
    "K, V, dtype",
    [(K, V, torch.bfloat16) for K, V in ((24, 40), (64, 96), (128, 128), (256, 200), (64, 512))]
    + [(24, 40, torch.float32), (256, 200, torch.float32)],
)
def test_delta_rules_fit_a_hopper_at_any_width(K: int, V: int, dtype: torch.dtype) -> None:
    """float16 takes the tiles and bytes of bfloat16."""
    assert {"onward", "back"} <= names("H100", "delta", "grouped_delta", "grouped_kda", K=K, V=V, dtype=dtype)


def compile_halves(operator: str, through: bool) -> dict[str, list[str]]:
    """Both halves of an operator, on and back; registers that nothing has written, by kernel."""
    from fake_gpu import FakeGPU

    from torchlinearmoe.kernels.halves import finished, open_table

    gpu = FakeGPU(*CHIPS["H100"], faults={}).install()
    halves, (inputs, options) = operators()[operator].find_backends()["triton"].halves, halves_inputs(operator)
    assert halves is not None and gpu.faults is not None
    table = open_table(Segments.of_lengths((1100, 30)))
    steps = halves.forward(table, *inputs, through=through, **options)
    passed = next(steps)
    next(steps)
    assert passed is not None and (passed.factor is not None) == through
    done = finished(steps, [torch.zeros_like(x) for x in passed.written])
    (o,) = done.results
    assert o is not None
    read = [None if index in done.forgotten else x for index, x in enumerate(inputs)]
    steps = halves.backward(table, read, done.kept, torch.zeros_like(o), **options)
    passed = next(steps)
    next(steps)
    assert passed is not None
    gradients = finished(steps, [torch.zeros_like(x) for x in passed.written]).results
    shapes = [[None if x is None else x.shape for x in of] for of in (inputs, gradients)]
    assert shapes[0] == shapes[1]
    assert gpu.compiled
    return gpu.faults


def halves_inputs(operator: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Of 1130 tokens and a head, and the options."""
    q, narrow, wide = (torch.zeros(1130, 1, width, dtype=torch.bfloat16) for width in (128, 64, 256))
    scalars, channels = torch.zeros(1130, 1), torch.zeros(1130, 1, 128)
    return {
        "linear": ((q, q, wide, channels, torch.zeros(1, 128)), {"scale": 0.1}),
        "delta": ((q, q, wide, scalars, scalars), {"scale": 0.1}),
        "dplr": ((*[narrow] * 5, channels[..., :64]), {"scale": 1.0, "lower_bound": -0.6}),
        "slots": ((q, q, q, narrow, channels[..., :64]), {"scale": 0.1}),
    }[operator]


@pytest.mark.parametrize("operator, through", [("linear", True), ("delta", True), ("dplr", False), ("slots", True)])
def test_halves_compile(operator: str, through: bool) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(compile_halves, operator, through).result() == {}


def compile_movement(chip: str, width: int, hidden: int, experts: int) -> tuple[list[str], dict[str, str]]:
    """A layer's way from tokens to sums, dropless and with dropped assignments, and the head's loss."""
    from fake_gpu import FakeGPU

    from torchlinearmoe.kernels.cross_entropy import triton as head
    from torchlinearmoe.kernels.dispatch import triton as dispatch
    from torchlinearmoe.kernels.experts import triton as layer
    from torchlinearmoe.kernels.swiglu import triton as gates

    gpu, x = FakeGPU(*CHIPS[chip], resources={}).install(), torch.zeros(8, width, dtype=torch.bfloat16)
    for dropless in (True, False):
        ids, weights = torch.zeros(8, 6, dtype=torch.int64), torch.ones(8, 6)
        keep = None if dropless else torch.ones(8, 6, dtype=torch.bool)
        order, inverse, _, offsets = (z.zero_() for z in dispatch.sorted_rows(ids, experts, keep))
        limit = layer._limit(offsets, keep)
        rows = dispatch.spread_tokens(x, inverse, limit)
        dispatch.gather_sum(rows, None, inverse, limit)
        dispatch.weighted_sum(rows, weights, order, inverse)
        dispatch.weighted_sum_backward(rows, weights, order, x)
        gate_up = x.new_zeros(48, 2 * hidden)
        h = gates.forward(gate_up, weights, order, limit)
        gates.backward(gate_up, weights, order, h, limit, again=True)
        gates.gated_backward(gate_up, gates.gated(gate_up))
    head.chunk_losses(x.new_zeros(4, 151936), torch.zeros(4, dtype=torch.int64))
    assert gpu.resources is not None
    return gpu.compiled, gpu.resources


@pytest.mark.parametrize("sizes", [(1024, 896, 64), (2048, 1408, 160)], ids=["A0.3B", "A1B"])
@pytest.mark.parametrize("chip", CHIPS)
def test_movement_gates_and_head_compile_with_hardly_a_spill_for(chip: str, sizes: tuple[int, int, int]) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        names, resources = pool.submit(compile_movement, chip, *sizes).result()
    moved = {"sort_count", "sort_scatter", "scatter_tokens", "gather_sum", "gather_weighted"}
    assert moved | {"swiglu_forward", "swiglu_backward", "cross_entropy_rows"} <= set(names)
    # Triton 3.6 keeps nothing on the stack, 3.9 two words of the gates' backward.
    spilled = {name: int(line.partition(" STACK:")[2].split()[0]) for name, line in resources.items()}
    assert max(spilled.values()) <= 8 and all(" LOCAL:0 " in line for line in resources.values()), spilled


@pytest.mark.parametrize("chip", EXTREMES)
def test_quadratic_attention_compiles_for(chip: str) -> None:
    expected = {"written", "join", "outputs", "products_of_outputs", "gradients"}
    assert names(chip, "taylor", K=16) == expected


def faults_of(name: str) -> dict[str, list[str]]:
    """Of the short cases of odd widths, in the process of a fake GPU."""
    from fake_gpu import FakeGPU

    gpu = FakeGPU(*CHIPS["H100"], faults={}).install()
    operator = operators()[name]
    for index, draw in enumerate(cases_of(operator)):
        torch.manual_seed(index)
        case = draw().rounded(torch.bfloat16)
        short = 60 < case.tokens < 80 or name == "quadratic" and index in (10, 11)
        if case.kind in operator.find_backends()["triton"].kinds and short:
            forced(operator, "triton", lambda case=case: case.run("triton", torch.bfloat16))
    assert gpu.compiled and gpu.faults is not None
    return gpu.faults


@pytest.mark.parametrize("name", ["linear", "ssd", "slots", "delta", "dplr", "quadratic"])
def test_no_kernel_reads_registers_that_nothing_wrote(name: str) -> None:
    """Of the installed Triton's compiler; narrow tiles are what an earlier one gets wrong (`unwritten.py`)."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(faults_of, name).result() == {}
