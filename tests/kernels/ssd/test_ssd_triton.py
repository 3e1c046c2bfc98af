"""Our Triton kernels of state space duality, interpreted: what the generic comparison has too few tokens for."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from cases import Case, assert_close, forced, relative_error
from cases.families import FAMILIES

from torchlinearmoe.kernels.chunk_table import table_of
from torchlinearmoe.kernels.linear import walk
from torchlinearmoe.kernels.ssd import dual
from torchlinearmoe.kernels.ssd import triton as ours
from torchlinearmoe.segments import Segments

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
LENGTHS = (70, 0, 150, 3, 66)


def run(case: Case, dtype: torch.dtype, **changes: int) -> dict[str, torch.Tensor]:
    """With these numbers of `dual` changed, in stretches of two chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "group_of", lambda places, longest=32: 2)
        for name, value in changes.items():
            patch.setattr(dual, name, value)
        return forced(case.operator, "triton", lambda: case.run("triton", dtype))


@pytest.mark.parametrize("states", ["", "in out"])
def test_documents_that_go_on_over_stretches_and_slabs(interpreter: ProcessPoolExecutor, states: str) -> None:
    """A slab holds two stretches of five; the heads of a group go together."""
    torch.manual_seed(5)
    case = FAMILIES["ssd"](LENGTHS, states, H=2, G=1, K=24, V=20)
    slab = 2 * 2 * 2 * 24 * 20 * 4
    found = interpreter.submit(run, case, torch.float32, MOST_BYTES=slab, PROGRAMS=1).result()
    expected = case.run("torch")
    # One sum over all tokens, whose terms cancel.
    assert_close({"d_A": found.pop("d_A")}, {"d_A": expected.pop("d_A")}, 1e-4)
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("programs", [1, 9], ids=["together", "in halves"])
def test_heads_of_a_group_in_parts(interpreter: ProcessPoolExecutor, programs: int) -> None:
    torch.manual_seed(6)
    case = FAMILIES["ssd"]((66, 3), "in out", H=8, G=2, K=16, V=72)
    found = interpreter.submit(run, case, torch.float32, PROGRAMS=programs).result()
    assert_close(found, case.run("torch"), 1e-5)


def test_parts_fill_the_chip_evenly() -> None:
    assert [dual.parts_of(32, programs) for programs in (2048, 264, 200, 20, 1)] == [1, 2, 4, 32, 32]
    assert [dual.parts_of(6, programs) for programs in (1000, 300, 200, 100)] == [1, 2, 3, 6]


@pytest.mark.parametrize("decay", [0.0, -1e-6, -3.0, -30.0, -1e4])
def test_steps_of_any_size(interpreter: ProcessPoolExecutor, decay: float) -> None:
    torch.manual_seed(7)
    case = FAMILIES["ssd"]((140,), "in out", H=2)
    case.inputs["A"] = torch.full_like(case.inputs["A"], decay)
    found, expected = interpreter.submit(run, case, torch.float32).result(), case.run("reference")
    for name in expected:
        if expected[name].norm() > 1e-6:
            assert relative_error(found[name], expected[name]) < (3e-4 if name == "d_A" else 1e-5), name
        else:  # next to nothing comes through
            assert found[name].norm() < 1e-6, name


def wide() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(8)
    case = FAMILIES["ssd"]((3, 40), "in out", K=40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "WIDEST", 16)
        return run(case, torch.float32), case.run("torch")


def test_wide_states_are_taken_in_parts(interpreter: ProcessPoolExecutor) -> None:
    assert_close(*interpreter.submit(wide).result(), 1e-5)


def check_operators(has_initial: bool, want_final: bool) -> None:
    """torch.library's own checks of both operators: schema, fake tensors, autograd, the compiler's view of them."""
    torch.manual_seed(2)
    lengths = (2, 0, 1)
    case = FAMILIES["ssd"](lengths, "in", H=2)
    x, dt, A, B, C, initial = (case.inputs[n].float() for n in ("x", "dt", "A", "B", "C", "initial_state"))
    table = table_of(Segments.of_lengths(lengths))
    places = (table.start_M, table.end_M, table.segment_M, table.first_N1)
    inputs = x, dt, A, B, C, initial if has_initial else None
    leaves = [part if part is None else part.detach().clone().requires_grad_() for part in inputs]
    torch.library.opcheck(dual.dual, (*leaves, *places, want_final))
    with torch.no_grad():
        _, _, entered = dual.dual(*leaves, *places, want_final)
    d_final = torch.randn_like(initial) if want_final else None
    # A gradient has none of its own.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        dual.dual_backward, (*inputs, entered, torch.randn_like(x), d_final, *places), test_utils=checks
    )


@pytest.mark.parametrize("has_initial, want_final", [(False, False), (True, True)])
def test_the_operators_are_what_the_compiler_takes_them_for(
    interpreter: ProcessPoolExecutor, has_initial: bool, want_final: bool
) -> None:
    interpreter.submit(check_operators, has_initial, want_final).result()


def compiled_and_eager() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Results and gradients through one full graph, and without the compiler."""
    torch.manual_seed(3)
    case = FAMILIES["ssd"]((3, 0, 66), "in out")

    def call(x, dt, A, B, C, initial_state, *, segments, want_final, backend):
        return ours.ssd(x, dt, A, B, C, segments, initial_state, want_final)

    results = []
    for case.function in (torch.compile(call, fullgraph=True, backend="aot_eager"), call):
        results.append(case.run("triton", torch.float32))
    return results[0], results[1]


def test_one_full_graph_gives_what_eager_gives(interpreter: ProcessPoolExecutor) -> None:
    assert_close(*interpreter.submit(compiled_and_eager).result(), 1e-6)
