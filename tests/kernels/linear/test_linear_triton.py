"""Our Triton kernels as operators of the compiler, and decays of any size in them, interpreted."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from cases import Case, assert_close, forced, relative_error
from cases.families import FAMILIES, mixed_decays
from torch._dynamo.testing import CompileCounterWithBackend

from torchlinearmoe.documents import Documents
from torchlinearmoe.kernels.chunk_table import table_of
from torchlinearmoe.kernels.linear import definition, walk
from torchlinearmoe.kernels.linear import per_channel as channel
from torchlinearmoe.kernels.linear import per_head as head
from torchlinearmoe.kernels.linear import triton as ours
from torchlinearmoe.kernels.linear.kinds import KINDS
from torchlinearmoe.segments import Segments

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
LENGTHS = (3, 0, 66)


def run(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return forced(case.operator, "triton", lambda: case.run("triton", dtype))


@pytest.mark.parametrize("decay", [0.0, -1e-6, -3.0, -20.0, -1e4, -torch.inf, "mixed"])
@pytest.mark.parametrize("kind", ["scalar", "diagonal", "bonus"])
def test_decays_of_any_size(interpreter: ProcessPoolExecutor, kind: str, decay: float | str) -> None:
    torch.manual_seed(1)
    case = FAMILIES[kind]((140,), "in out", H=1)
    if isinstance(decay, float):
        case.inputs["log_decay"] = torch.full_like(case.inputs["log_decay"], decay)
    else:
        mixed_decays(case)
    found, expected = interpreter.submit(run, case).result(), case.run("reference")
    for name in expected:
        if expected[name].norm() > 1e-6:
            assert relative_error(found[name], expected[name]) < 1e-4, name
        else:  # next to nothing comes through; gradients of decays are differences of sums
            assert found[name].norm() < (1e-4 if name == "d_log_decay" else 1e-5), name


def in_stretches(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Stretches of two chunks: documents begin, end and go on in them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "group_of", lambda places, longest=32: 2)
        return run(case, dtype)


@pytest.mark.parametrize("states", ["", "in out"])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_that_go_on_over_stretches(interpreter: ProcessPoolExecutor, kind: str, states: str) -> None:
    torch.manual_seed(5)
    case = FAMILIES[kind]((70, 0, 300, 3, 130), states, H=1, K=24, V=20)
    found = interpreter.submit(in_stretches, case, torch.float32).result()
    assert_close(found, case.run("torch"), 1e-5)


def wide(kind: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(6)
    case = FAMILIES[kind]((3, 40), "in out", H=1, K=16, V=40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "WIDEST", 16)
        return run(case), case.run("torch")


@pytest.mark.parametrize("kind", ["identity", "diagonal"])
def test_wide_values_are_taken_in_parts(interpreter: ProcessPoolExecutor, kind: str) -> None:
    found, expected = interpreter.submit(wide, kind).result()
    assert_close(found, expected, 1e-5)


def check_operators(per_channel: bool, has_g: bool, has_initial: bool, want_final: bool) -> None:
    """torch.library's own checks of both operators: schema, fake tensors, autograd, the compiler's view of them."""
    torch.manual_seed(2)
    lengths = (2, 0, 1)
    case = FAMILIES["bonus" if per_channel else "scalar"](lengths, "in", H=1)
    q, k, v, g, initial = (case.inputs[name].float() for name in ("q", "k", "v", "log_decay", "initial_state"))
    table = table_of(Segments.of_lengths(lengths))
    places = (table.start_M, table.end_M, table.segment_M, table.first_N1)
    extra = [case.inputs["bonus"].float() if has_initial else None] if per_channel else []
    inputs = q, k, v, g if has_g else None, *extra, initial if has_initial else None
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in inputs]
    forward, backward = (
        (channel.per_channel, channel.per_channel_backward) if per_channel else (head.per_head, head.per_head_backward)
    )
    torch.library.opcheck(forward, (*leaves, *places, 0.25, want_final))
    with torch.no_grad():
        _, final, entered, *c = forward(*leaves, *places, 0.25, want_final)
    d_final = torch.randn_like(initial) if want_final else None
    decays = c if per_channel else [g if has_g else None]
    saved = q, k, v, *decays, *extra, initial if has_initial else None, entered, final
    arguments = (*saved, torch.randn_like(v), d_final, *places, 0.25, has_g)
    # A gradient has none of its own.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(backward, arguments, test_utils=checks)


@pytest.mark.parametrize(
    "per_channel, has_g, has_initial, want_final",
    [
        (False, False, False, False),
        (False, True, False, False),
        (False, False, True, True),
        (False, True, True, True),
        (True, True, False, False),
        (True, True, True, True),
    ],
)
def test_the_operators_are_what_the_compiler_takes_them_for(
    interpreter: ProcessPoolExecutor, per_channel: bool, has_g: bool, has_initial: bool, want_final: bool
) -> None:
    interpreter.submit(check_operators, per_channel, has_g, has_initial, want_final).result()


def compiled_and_eager(kind: str, states: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Results and gradients through one full graph, and without the compiler."""
    torch.manual_seed(3)
    case = FAMILIES[kind](LENGTHS, states)

    def call(q, k, v, log_decay=None, bonus=None, initial_state=None, *, segments, want_final, backend):
        assert backend == "triton"
        scale = q.shape[-1] ** -0.5
        return ours.linear_recurrence(q, k, v, log_decay, bonus, scale, segments, initial_state, want_final)

    results = []
    for function in (torch.compile(call, fullgraph=True, backend="aot_eager"), call):
        case.function = function
        results.append(case.run("triton", torch.float32))
    return results[0], results[1]


@pytest.mark.parametrize(
    "kind, states",
    [("identity", ""), ("constant", "in"), ("scalar", "in out"), ("diagonal", ""), ("bonus", "in out")],
)
def test_one_full_graph_gives_what_eager_gives(interpreter: ProcessPoolExecutor, kind: str, states: str) -> None:
    found, expected = interpreter.submit(compiled_and_eager, kind, states).result()
    assert_close(found, expected, 1e-6)


def graphs_of_batches(prepared: bool) -> int:
    """Graphs made for batches of one to sixteen documents, whose outputs are compared with the definition's."""
    torch.manual_seed(4)
    case, counter = FAMILIES["scalar"]((40,), "", H=1), CompileCounterWithBackend("aot_eager")
    q, k, v, g = (case.inputs[name].float() for name in ("q", "k", "v", "log_decay"))

    @torch.compile(fullgraph=True, backend=counter)
    def call(segments: Segments) -> torch.Tensor:
        return ours.linear_recurrence(q, k, v, g, None, 1.0, segments, None, False)[0]

    for borders in ([0, 40], [0, 7, 40], [*range(16), 40]):
        documents = Documents.packed(borders)
        if prepared:
            table_of(documents.bounded)
        expected, _ = definition.linear_recurrence(q, k, v, g, None, 1.0, documents.segments, None, False)
        torch.testing.assert_close(call(documents.bounded), expected)
    return counter.frame_count


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "in the graph"])
def test_one_graph_for_batches_of_different_documents(interpreter: ProcessPoolExecutor, prepared: bool) -> None:
    assert interpreter.submit(graphs_of_batches, prepared).result() == 1
