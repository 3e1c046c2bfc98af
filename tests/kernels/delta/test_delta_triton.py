"""The delta rule by our Triton kernels: more than what the generic comparison asks, interpreted."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from cases import Case, assert_close, forced, relative_error
from cases.families import FAMILIES, mixed_decays
from torch.nn import functional as F

from torchlinearmoe.kernels.chunk_table import table_of
from torchlinearmoe.kernels.delta import rule
from torchlinearmoe.kernels.delta import triton as ours
from torchlinearmoe.kernels.linear import walk
from torchlinearmoe.segments import Segments

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
KINDS = ("delta", "gated_delta", "kda")


def run(case: Case, dtype: torch.dtype = torch.float32, group: int = 16) -> dict[str, torch.Tensor]:
    """By stretches of so many chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "group_of", lambda places, longest=32: group)
        return forced(case.operator, "triton", lambda: case.run("triton", dtype))


@pytest.mark.parametrize("decay", [0.0, -1e-6, -3.0, -20.0, -1e4, -torch.inf, "mixed"])
@pytest.mark.parametrize("kind", ["gated_delta", "kda"])
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


@pytest.mark.parametrize("states", ["", "in out"])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_that_go_on_over_stretches(interpreter: ProcessPoolExecutor, kind: str, states: str) -> None:
    """Stretches of two chunks: documents begin, end and go on in them, and end where they end."""
    torch.manual_seed(5)
    case = FAMILIES[kind]((70, 0, 300, 3, 64, 130), states, H=1, K=24, V=20)
    found = interpreter.submit(run, case, torch.float32, 2).result()
    assert_close(found, case.run("torch"), 1e-5)


def test_wide_keys_over_stretches(interpreter: ProcessPoolExecutor) -> None:
    torch.manual_seed(6)
    case = FAMILIES["gated_delta"]((0, 140, 64, 3), "in out", H=1, K=130, V=20)
    found = interpreter.submit(run, case, torch.float32, 2).result()
    assert_close(found, case.run("torch"), 1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float16, 2e-2)])
@pytest.mark.parametrize("kind", KINDS)
def test_one_key_flipped_over_and_over(
    interpreter: ProcessPoolExecutor, kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    """At beta = 2 a transition has the eigenvalue -1; the overlaps of equal keys are the largest there are."""
    torch.manual_seed(7)
    case = FAMILIES[kind]((200,), "in out", H=1)
    inputs = case.inputs
    inputs["beta"] = torch.full_like(inputs["beta"], 2.0)
    inputs["k"] = F.normalize(inputs["k"][:1] + 0.05 * inputs["k"], dim=-1)
    if "log_decay" in inputs:
        inputs["log_decay"] = inputs["log_decay"] / 100
    case = case.rounded(dtype)
    if kind in ("kda", "grouped_kda") and dtype == torch.float16:
        tolerance *= 4  # TF32 cuts k e^c off after eleven bits; k by itself has no more
    assert_close(interpreter.submit(run, case, dtype, 2).result(), case.run("reference"), tolerance)


def check_operators(kind: str, states: bool) -> None:
    """torch.library's own checks of both operators: schema, fake tensors, autograd, the compiler's view of them."""
    torch.manual_seed(2)
    lengths = (2, 0, 1)
    case = FAMILIES[kind](lengths, "in", H=1)
    names = ("q", "k", "v", "beta", "log_decay", "initial_state")
    inputs = [case.inputs[name].float() if name in case.inputs else None for name in names]
    if not states:
        inputs[-1] = None
    table = table_of(Segments.of_lengths(lengths))
    places = (table.start_M, table.end_M, table.segment_M, table.first_N1)
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in inputs]
    torch.library.opcheck(rule.delta_rule, (*leaves, *places, 0.25, states))
    with torch.no_grad():
        o, final, *kept, sums = rule.delta_rule(*leaves, *places, 0.25, states)
    if sums.numel():
        inputs[4] = sums
    d_final = torch.randn_like(final) if states else None
    arguments = (*inputs, *kept, torch.randn_like(o), d_final, *places, 0.25)
    # A gradient has none of its own.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(rule.delta_rule_backward, arguments, test_utils=checks)


@pytest.mark.parametrize("kind, states", [("delta", True), ("gated_delta", False), ("kda", True)])
def test_the_operators_are_what_the_compiler_takes_them_for(
    interpreter: ProcessPoolExecutor, kind: str, states: bool
) -> None:
    interpreter.submit(check_operators, kind, states).result()


def compiled_and_eager(kind: str, states: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Results and gradients through one full graph, and without the compiler; stretches of one chunk."""
    torch.manual_seed(3)
    case = FAMILIES[kind]((3, 0, 66), states, groups=2)

    def call(q, k, v, beta, log_decay=None, initial_state=None, *, segments, want_final, l2_norm, backend):
        assert backend == "triton"
        return ours.delta_rule(q, k, v, beta, log_decay, 0.25, segments, initial_state, want_final)

    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "group_of", lambda places, longest=32: 1)
        for function in (torch.compile(call, fullgraph=True, backend="aot_eager"), call):
            case.function = function
            results.append(case.run("triton", torch.float32))
    return results[0], results[1]


@pytest.mark.parametrize("kind, states", [("delta", ""), ("gated_delta", "in out"), ("kda", "in")])
def test_one_full_graph_gives_what_eager_gives(interpreter: ProcessPoolExecutor, kind: str, states: str) -> None:
    found, expected = interpreter.submit(compiled_and_eager, kind, states).result()
    assert_close(found, expected, 1e-6)
