"""Our experts from tokens to sums: what is kept, memory that nobody wrote, an operator of the compiler; interpreted."""

from __future__ import annotations

import importlib.util
import math
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from cases import assert_close, experts, forced
from torch import Tensor

from torchlinearmoe.kernels.experts import OPERATOR, budget, plain
from torchlinearmoe.kernels.experts import triton as ours

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def results(case: experts.Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    return forced(OPERATOR, backend, lambda: case.run(backend, dtype, device))


def unwritten() -> None:
    """Every new tensor is full of NaN, and of the largest number where it is of integers."""
    torch.manual_seed(0)
    case = experts.routed(40, 5, 3, kept=0.5).rounded(torch.float32)
    expected = results(case, "reference", torch.float64)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()  # pyright: ignore
    assert_close(results(case, "triton", torch.float32), expected, 1e-5)


@needs_triton
def test_rows_that_no_expert_has_reach_nothing(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(unwritten).result()


def kept() -> tuple[list[tuple[int, ...]], list[int]]:
    """Shapes of what is kept, and places of those that went in."""
    case = experts.routed(7, 5, 3)
    inputs = [x.float() for x in case.inputs.values()]
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (found.append(x), x)[1], lambda x: x):
        x, weights, gate_up, down = (x.requires_grad_() for x in inputs)
        ours.experts(x, case.options["ids_Tk"], weights, gate_up, down, None, "auto")
    places = [x.data_ptr() for x in inputs]
    return [tuple(x.shape) for x in found if x.data_ptr() not in places], [
        i for i, place in enumerate(places) if place in {x.data_ptr() for x in found}
    ]


@needs_triton
def test_nothing_is_kept_but_the_gates_the_indices_and_what_went_in(interpreter: ProcessPoolExecutor) -> None:
    made, inputs = interpreter.submit(kept).result()
    gates, order, inverse, offsets = (21, 16), (21,), (7, 3), (5,)
    assert made == [gates, order, inverse, offsets] and inputs == [0, 1, 2, 3]
    # What the budget says and a plan prices: the tokens and these gates.
    assert budget(tokens=7, top_k=3, width=16, hidden=8, experts=5).saved_bytes == 2 * (7 * 16 + math.prod(gates))


def arguments(kept: float) -> tuple[Tensor | None, ...]:
    torch.manual_seed(1)
    case = experts.routed(5, 3, 2, width=8, kept=kept)
    x, weights, gate_up, down = (x.float().requires_grad_() for x in case.inputs.values())
    return x, case.options["ids_Tk"], weights, gate_up, down, case.options["keep_Tk"]


def check_operators(kept: float) -> None:
    """torch.library's own checks of both operators; the third compares outputs, of which rows may be unspecified."""
    inputs = arguments(kept)
    checks = ("test_schema", "test_faketensor", *(["test_aot_dispatch_dynamic"] if kept == 1 else []))
    torch.library.opcheck(ours.whole, (*inputs, "loop"), test_utils=(*checks, "test_autograd_registration"))
    x, ids, weights, gate_up, down, keep = (x if x is None else x.detach() for x in inputs)
    _, *made = ours.whole(x, ids, weights, gate_up, down, keep, "loop")
    torch.library.opcheck(
        ours.whole_backward, (x, weights, gate_up, down, keep, *made, torch.randn(5, 8), "loop"), test_utils=checks
    )


@needs_triton
@pytest.mark.parametrize("kept", [1.0, 0.5])
def test_the_operators_are_what_the_compiler_takes_them_for(interpreter: ProcessPoolExecutor, kept: float) -> None:
    interpreter.submit(check_operators, kept).result()


def compiled_and_eager(kept: float) -> None:
    """Results and gradients through one full graph of any number of tokens, and without the compiler."""
    run = torch.compile(ours.experts, fullgraph=True, backend="aot_eager")
    for tokens in (20, 23):
        torch.manual_seed(tokens)
        case = experts.routed(tokens, 5, 3, kept=kept)
        found = []
        for function in (run, ours.experts):
            case.function = lambda *, backend, function=function, **given: function(**given, products="auto")
            found.append(case.run("triton", torch.float32))
        assert_close(found[0], found[1], 1e-6)


@needs_triton
@pytest.mark.parametrize("kept", [1.0, 0.5])
def test_one_full_graph_gives_what_eager_gives(interpreter: ProcessPoolExecutor, kept: float) -> None:
    interpreter.submit(compiled_and_eager, kept).result()


@pytest.mark.parametrize("kept", [1.0, 0.5])
def test_step_by_step_compiles_whole(kept: float) -> None:
    torch.manual_seed(2)
    case = experts.routed(20, 5, 3, kept=kept)
    expected = results(case, "reference", torch.float64)
    run = torch.compile(plain.experts, fullgraph=True, backend="aot_eager")
    case.function = lambda *, backend, **given: run(**given, products="loop")
    assert_close(case.run("torch"), expected, 1e-11)


def large(kept: float) -> experts.Case:
    """The layer of a model, as wide, with few tokens more than a whole number of tiles."""
    torch.manual_seed(3)
    return experts.routed(1031, 64, 8, width=1024, hidden=896, kept=kept).rounded(torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [1.0, 0.7])
def test_layers_as_wide_as_models_have_them_on_a_gpu(kept: float) -> None:
    case = large(kept)
    inputs = {name: x.cuda() for name, x in case.inputs.items()}
    case.inputs, case.options = inputs, {k: None if x is None else x.cuda() for k, x in case.options.items()}
    expected = results(case, "torch", torch.float64, "cuda")
    assert_close(results(case, "triton", torch.bfloat16, "cuda"), expected, 1e-2)


@pytest.mark.gpu
def test_every_run_gives_the_same_bits_and_never_waits_on_a_gpu() -> None:
    case = large(0.7)
    inputs = [x.to("cuda", torch.float32 if name in case.wide else torch.bfloat16) for name, x in case.inputs.items()]
    x, weights, gate_up, down = (x.requires_grad_() for x in inputs)
    ids, keep = case.options["ids_Tk"].cuda(), case.options["keep_Tk"].cuda()

    def run() -> list[Tensor]:
        y = ours.experts(x, ids, weights, gate_up, down, keep, "grouped_mm")
        return [y, *torch.autograd.grad(y, (x, weights, gate_up, down), x)]

    first = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [run() for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for found in again for a, b in zip(first, found, strict=True))
