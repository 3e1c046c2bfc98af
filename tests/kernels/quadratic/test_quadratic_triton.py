"""Quadratic attention by our Triton kernels: more than what the generic comparison asks, interpreted."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from cases import Case, assert_close, forced
from cases.quadratic import case

from torchlinearmoe.kernels import choose
from torchlinearmoe.kernels.chunk_table import CHUNK, table_of
from torchlinearmoe.kernels.operator import Call, operators
from torchlinearmoe.kernels.quadratic import triton as ours
from torchlinearmoe.kernels.quadratic.features import KINDS, feature_width
from torchlinearmoe.segments import Segments

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def in_stretches(case: Case, group: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Stretches of so many chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "group_of", lambda features: group)
        return forced(case.operator, "triton", lambda: case.run("triton", dtype))


@pytest.mark.parametrize("states, normalize", [("", True), ("in out", True), ("in out", False)])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_that_go_on_over_stretches(
    interpreter: ProcessPoolExecutor, kind: str, states: str, normalize: bool
) -> None:
    """They begin, end and go on in stretches of two chunks."""
    torch.manual_seed(1)
    drawn = case(kind, (70, 0, 200, 3), states, H=1, K=7, V=5, normalize=normalize)
    assert_close(interpreter.submit(in_stretches, drawn, 2).result(), drawn.run("torch"), 1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 5e-3)], ids=["float32", "float16"])
def test_wide_values_and_odd_keys(interpreter: ProcessPoolExecutor, dtype: torch.dtype, tolerance: float) -> None:
    """Values in two parts and a bit, keys that are padded, features in several blocks."""
    torch.manual_seed(2)
    drawn = case("taylor", (3, 70), "in out", H=1, K=17, V=150).rounded(dtype)
    assert_close(interpreter.submit(in_stretches, drawn, 1, dtype).result(), drawn.run("torch"), tolerance)


@pytest.mark.parametrize("kind, width", [("taylor", 1), ("square", 2), ("taylor", 65), ("square", 128)])
def test_every_feature_is_found(interpreter: ProcessPoolExecutor, kind: str, width: int) -> None:
    """A final state lists them, and the gradient of an initial one."""
    torch.manual_seed(3)
    drawn = case(kind, (2,), "in out", H=1, K=width, V=1, normalize=False)
    assert_close(interpreter.submit(in_stretches, drawn, 4).result(), drawn.run("torch"), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_states_of_stretches_are_at_most_as_large_as_values(kind: str) -> None:
    """In numbers, at widths that are in use; short stretches are for narrow keys alone."""
    for width in range(1, 129):
        rows, tokens = feature_width(kind, width), CHUNK * ours.group_of(feature_width(kind, width))
        assert rows <= 1.05 * tokens and (tokens <= 256 or rows >= tokens / 4)


def test_wider_keys_are_refused_in_a_line() -> None:
    operator = operators()["quadratic"]
    machine = choose.Machine((9, 0), (3, 6, 0), frozenset(), False)
    name, reason = choose.decide(operator, "triton", Call("taylor", "cuda", torch.bfloat16, 144), machine)
    assert name == "" and "at most 128 channels; use 'auto' or 'torch'" in reason


def check_operators(normalize: bool, has_initial: bool, want_final: bool) -> None:
    """torch.library's own checks of both operators: schema, fake tensors, autograd, the compiler's view of them."""
    torch.manual_seed(4)
    lengths = (2, 0, 1)
    drawn = case("taylor", lengths, "in", H=1, K=2, V=3, normalize=normalize)
    q, k, v, initial = (drawn.inputs[name].float() for name in ("q", "k", "v", "initial_state"))
    table = table_of(Segments.of_lengths(lengths))
    places = (table.start_M, table.end_M, table.segment_M, table.first_N1)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    entering = initial.detach().clone().requires_grad_() if has_initial else None
    options = (True, 0.3, normalize)
    torch.library.opcheck(ours.quadratic, (*leaves, entering, *places, *options, 1.0, want_final))
    with torch.no_grad():
        o, _, entered, r = ours.quadratic(*leaves, entering, *places, *options, 1.0, want_final)
    d_final = torch.randn_like(initial) if want_final else None
    arguments = (q, k, v, initial if has_initial else None, entered, o, r, torch.randn_like(v), d_final, *places)
    # A gradient has none of its own.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ours.quadratic_backward, (*arguments, *options), test_utils=checks)


@pytest.mark.parametrize("normalize, states", [(True, False), (False, True), (True, True)])
def test_the_operators_are_what_the_compiler_takes_them_for(
    interpreter: ProcessPoolExecutor, normalize: bool, states: bool
) -> None:
    interpreter.submit(check_operators, normalize, states, states).result()


def compiled_and_eager(kind: str, states: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Results and gradients through one full graph, and without the compiler, over stretches."""
    torch.manual_seed(5)
    drawn = case(kind, (3, 0, 66), states, H=1)

    def call(q, k, v, initial_state=None, *, segments, kind, scale, normalize, eps, want_final, backend):
        assert backend == "triton"
        return ours.quadratic_attention(q, k, v, kind, scale, normalize, eps, segments, initial_state, want_final)

    results = []
    for function in (torch.compile(call, fullgraph=True, backend="aot_eager"), call):
        drawn.function = function
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ours, "group_of", lambda features: 1)
            results.append(drawn.run("triton", torch.float32))
    return results[0], results[1]


@pytest.mark.parametrize("kind, states", [("taylor", ""), ("square", "in out")])
def test_one_full_graph_gives_what_eager_gives(interpreter: ProcessPoolExecutor, kind: str, states: str) -> None:
    found, expected = interpreter.submit(compiled_and_eager, kind, states).result()
    assert_close(found, expected, 1e-6)
