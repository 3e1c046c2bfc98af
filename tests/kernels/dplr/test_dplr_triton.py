"""DPLR by our Triton kernels: more than what the generic comparison asks, interpreted."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from cases import Case, assert_close, forced, relative_error
from cases.dplr import case
from cases.families import mixed_decays
from torch.nn import functional as F

from torchlinearmoe.kernels.chunk_table import table_of
from torchlinearmoe.kernels.dplr import triton as ours
from torchlinearmoe.kernels.dplr.rule import dplr, dplr_backward, levels_of
from torchlinearmoe.kernels.linear import walk
from torchlinearmoe.kernels.operator import Call
from torchlinearmoe.segments import Segments

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
RWKV7 = -0.6065306597126334
"""The bound of its log decays."""


def run(case: Case, dtype: torch.dtype = torch.float32, group: int = 16) -> dict[str, torch.Tensor]:
    """In stretches of `group` chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "group_of", lambda places, longest=32: group)
        return forced(case.operator, "triton", lambda: case.run("triton", dtype))


def bounded(case: Case, bound: float) -> Case:
    case.options["lower_bound"] = bound
    case.inputs["log_decay"] = bound * torch.rand_like(case.inputs["log_decay"]) * (1 - 1e-6)
    return case


@pytest.mark.parametrize("states", ["", "in out"])
@pytest.mark.parametrize("group", [1, 2])
def test_documents_go_on_over_stretches(interpreter: ProcessPoolExecutor, group: int, states: str) -> None:
    """They begin and end at the borders of stretches, and between them."""
    torch.manual_seed(1)
    drawn = case((70, 0, 128, 3, 130), states, H=1, K=24, V=20)
    found = interpreter.submit(run, drawn, torch.float32, group).result()
    assert_close(found, drawn.run("torch"), 1e-5)


@pytest.mark.parametrize("bound, levels", [(RWKV7, 0), (-2.0, 1), (-4.0, 2), (-5.5, 3), (-500.0, 3)])
def test_bounded_decays_take_larger_blocks(interpreter: ProcessPoolExecutor, bound: float, levels: int) -> None:
    torch.manual_seed(2)
    assert levels_of(bound) == levels
    drawn = bounded(case((130, 40), "in out", H=1), bound)
    assert_close(interpreter.submit(run, drawn).result(), drawn.run("reference"), 2e-5)


@pytest.mark.parametrize("chip, dtype, fits", [((8, 9), torch.float32, False), ((8, 9), torch.bfloat16, True)])
def test_float32_wants_the_shared_memory_of_large_chips(
    monkeypatch: pytest.MonkeyPatch, chip: tuple[int, int], dtype: torch.dtype, fits: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: chip)
    assert (ours.BACKEND.refuses(Call("dplr", "cuda", dtype, 64)) is None) == fits


def test_decays_without_a_bound_take_the_smallest_blocks() -> None:
    assert levels_of(None) == 3 and levels_of(-1e-9) == 0


@pytest.mark.parametrize("bound", [RWKV7, None], ids=str)
def test_decays_at_the_bound_stay_accurate_in_16_bits(interpreter: ProcessPoolExecutor, bound: float | None) -> None:
    torch.manual_seed(3)
    drawn = case((130,), "in out", H=1)
    drawn.inputs["log_decay"] = torch.full_like(drawn.inputs["log_decay"], RWKV7 * (1 - 1e-6))
    drawn.options["lower_bound"] = bound
    drawn = drawn.rounded(torch.float16)
    assert_close(interpreter.submit(run, drawn, torch.float16).result(), drawn.run("reference"), 3e-3)


@pytest.mark.parametrize("decay", [0.0, -1e-6, -20.0, -1e4, -torch.inf, "mixed"])
def test_decays_of_any_size(interpreter: ProcessPoolExecutor, decay: float | str) -> None:
    torch.manual_seed(4)
    drawn = case((130, 3), "in out", H=1)
    if isinstance(decay, float):
        drawn.inputs["log_decay"] = torch.full_like(drawn.inputs["log_decay"], decay)
    else:
        mixed_decays(drawn)
    found, expected = interpreter.submit(run, drawn).result(), drawn.run("reference")
    for name in expected:
        if expected[name].norm() > 1e-6:
            assert relative_error(found[name], expected[name]) < 1e-4, name
        else:  # next to nothing comes through; gradients of decays are differences of sums
            assert found[name].norm() < (1e-4 if name == "d_log_decay" else 1e-5), name


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float16, 1e-2)])
def test_one_key_removed_over_and_over(interpreter: ProcessPoolExecutor, dtype: torch.dtype, tolerance: float) -> None:
    """The overlaps of equal keys are the largest there are: the system is as far from the identity as it gets."""
    torch.manual_seed(5)
    drawn = case((200,), "in out", H=1, K=32, V=32)
    a = F.normalize(drawn.inputs["a"][:1] + 0.05 * drawn.inputs["a"], dim=-1)
    drawn.inputs |= {"a": a, "b": -a, "log_decay": drawn.inputs["log_decay"] / 100}
    drawn = drawn.rounded(dtype)
    assert_close(interpreter.submit(run, drawn, dtype).result(), drawn.run("reference"), tolerance)


def runs_twice(case: Case) -> bool:
    first, second = run(case, torch.float32, 1), run(case, torch.float32, 1)
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_same_bits_on_every_run(interpreter: ProcessPoolExecutor) -> None:
    torch.manual_seed(6)
    assert interpreter.submit(runs_twice, case((70, 3), "in out", H=1)).result()


def check_operators(states: bool) -> None:
    """torch.library's own checks of both operators: schema, fake tensors, autograd, the compiler's view of them."""
    torch.manual_seed(7)
    lengths = (70, 0, 1) if states else (2, 1)
    drawn = case(lengths, "in", H=1)
    names = ("q", "k", "v", "a", "b", "log_decay", "initial_state")
    inputs = [drawn.inputs[name].float() if states or name != "initial_state" else None for name in names]
    table = table_of(Segments.of_lengths(lengths))
    places = (table.start_M, table.end_M, table.segment_M, table.first_N1)
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in inputs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "group_of", lambda places, longest=32: 1)
        torch.library.opcheck(dplr, (*leaves, *places, 0.25, 3, states))
        with torch.no_grad():
            _, final, entered, transitions, c = dplr(*leaves, *places, 0.25, 3, states)
        q, k, v, a, b, _, initial = inputs
        assert v is not None
        d_final = torch.randn_like(final) if states else None
        arguments = (q, k, v, a, b, c, initial, entered, transitions, torch.randn_like(v), d_final)
        # A gradient has none of its own.
        checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(dplr_backward, (*arguments, *places, 0.25, 3, states), test_utils=checks)


@pytest.mark.parametrize("states", [False, True], ids=["", "states"])
def test_the_operators_are_what_the_compiler_takes_them_for(interpreter: ProcessPoolExecutor, states: bool) -> None:
    interpreter.submit(check_operators, states).result()


def compiled_and_eager() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Results and gradients through one full graph, and without the compiler."""
    torch.manual_seed(8)
    drawn = case((3, 0, 66), "in out", H=1)

    def call(q, k, v, a, b, log_decay, initial_state, *, segments, want_final, backend):
        assert backend == "triton"
        return ours.dplr_rule(q, k, v, a, b, log_decay, None, 0.25, segments, initial_state, want_final)

    results = []
    for function in (torch.compile(call, fullgraph=True, backend="aot_eager"), call):
        drawn.function = function
        results.append(drawn.run("triton", torch.float32))
    return results[0], results[1]


def test_one_full_graph_gives_what_eager_gives(interpreter: ProcessPoolExecutor) -> None:
    found, expected = interpreter.submit(compiled_and_eager).result()
    assert_close(found, expected, 1e-6)
