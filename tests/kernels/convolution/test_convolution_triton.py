"""Our Triton convolution: widths, strides and spans of all kinds, an operator of the compiler; interpreted."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from cases import assert_close, convolution, forced
from cases.recurrences import AWKWARD, normal, stream
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from torchlinearmoe.documents import Documents
from torchlinearmoe.kernels.convolution import OPERATOR, definition
from torchlinearmoe.kernels.convolution import triton as ours
from torchlinearmoe.segments import Segments

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def compare(case: convolution.Case, dtype: torch.dtype = torch.float32, tolerance: float = 1e-5) -> None:
    case = case.rounded(dtype)
    found = forced(OPERATOR, "triton", lambda: case.run("triton", dtype))
    assert_close(found, forced(OPERATOR, "reference", lambda: case.run("reference")), tolerance)


def width(W: int, bias: bool, activation: str | None, states: str) -> None:
    torch.manual_seed(W)
    compare(convolution.case((0, 2, 9, 0, 1, 1, 20), states, W=W, bias=bias, activation=activation))


@pytest.mark.parametrize("bias, activation, states", [(True, "silu", "in out"), (False, "silu", ""), (True, None, "")])
@pytest.mark.parametrize("W", [1, 2, 3, 4, 5, 8])
def test_every_width(interpreter: ProcessPoolExecutor, W: int, bias: bool, activation: str | None, states: str) -> None:
    interpreter.submit(width, W, bias, activation, states).result()


def awkward_streams(lengths: tuple[int, ...], states: str) -> None:
    torch.manual_seed(1)
    compare(convolution.case(lengths, states, D=2))


@pytest.mark.parametrize("states", ["", "in out"])
@pytest.mark.parametrize("lengths", [AWKWARD, (64, 5)], ids=["borders anywhere", "a border at the end of a tile"])
def test_tiles_of_one_document_and_of_several(
    interpreter: ProcessPoolExecutor, lengths: tuple[int, ...], states: str
) -> None:
    assert ours.SHORT * ours.SPANS == 64
    interpreter.submit(awkward_streams, lengths, states).result()


def long_spans() -> None:
    """Spans as long streams have them, in a tile that is one document's and in one that is not."""
    torch.manual_seed(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "MANY", 0)
        assert ours._tiles(torch.empty(1, 1))[1] == ours.LONG
        compare(convolution.case((270, 3), "", D=2))


def test_long_spans(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(long_spans).result()


def several_blocks() -> None:
    torch.manual_seed(2)
    compare(convolution.case((30, 50), "in out", D=ours.CHANNELS + 3))


def test_more_channels_than_a_tile_has(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(several_blocks).result()


def laid_out(layout: str) -> None:
    """The same values in memory as `layout` says give the same, and only channels apart from each other are copied."""
    torch.manual_seed(3)
    x, dy, weight = torch.randn(40, 6), torch.randn(40, 6), torch.randn(6, 4)
    x = x[:1].expand(40, 6) if layout == "one row" else x
    segments = Segments.of_lengths((13, 27))
    places = {
        "slice": lambda x: torch.cat([torch.zeros(40, 2), x, torch.zeros(40, 3)], 1)[:, 2:8],
        "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
        "one row": lambda x: x,
        "transposed": lambda x: x.t().contiguous().t(),
        "every other channel": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    }
    there, dy_there = places[layout](x), places[layout](dy)
    assert torch.equal(there, x) and not there.is_contiguous()
    assert (ours._readable(there) is there) == (layout in ("slice", "every other row", "one row"))
    results = []
    for x_, dy_ in ((x.contiguous(), dy), (there, dy_there)):
        leaf, taps = x_.detach().requires_grad_(), weight.clone().requires_grad_()
        y, _ = ours.short_convolution(leaf, taps, None, "silu", segments, None, False)
        results.append((y, *torch.autograd.grad(y, (leaf, taps), dy_)))
    assert all(torch.equal(found, expected) for found, expected in zip(*results, strict=True))


@pytest.mark.parametrize("layout", ["slice", "every other row", "one row", "transposed", "every other channel"])
def test_rows_of_any_stride(interpreter: ProcessPoolExecutor, layout: str) -> None:
    interpreter.submit(laid_out, layout).result()


def kept() -> None:
    x, weight, bias = torch.randn(40, 6), torch.randn(6, 4), torch.randn(6)
    segments, kept = Segments.of_lengths((13, 27)), []
    inputs = {z.data_ptr() for z in (x, weight, bias, segments.ids, segments.borders)}
    with torch.autograd.graph.saved_tensors_hooks(lambda z: kept.append(z.data_ptr()), lambda z: z):
        x, weight, bias = (z.requires_grad_() for z in (x, weight, bias))
        ours.short_convolution(x, weight, bias, "silu", segments, None, False)
    assert set(kept) == inputs


def test_nothing_is_kept_but_what_went_in(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(kept).result()


def arguments(has_bias: bool, has_initial: bool) -> tuple[Tensor | None, ...]:
    torch.manual_seed(4)
    segments = Segments.of_lengths((3, 0, 2))
    bias = torch.randn(2) if has_bias else None
    initial = torch.randn(3, 2, 2) if has_initial else None
    leaves = [z if z is None else z.requires_grad_() for z in (torch.randn(5, 2), torch.randn(2, 3), bias, initial)]
    return *leaves, segments.ids, segments.borders


def check_operators(has_bias: bool, has_initial: bool) -> None:
    """torch.library's own checks of both operators: schema, fake tensors, autograd, the compiler's view of them."""
    inputs = arguments(has_bias, has_initial)
    torch.library.opcheck(ours.convolve, (*inputs, True))
    detached = [None if z is None else z.detach() for z in inputs]
    # A gradient has none of its own.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ours.convolve_backward, (*detached, torch.randn(5, 2), True), test_utils=checks)


@pytest.mark.parametrize("has_bias, has_initial", [pytest.param(False, False, marks=pytest.mark.slow), (True, True)])
def test_the_operators_are_what_the_compiler_takes_them_for(
    interpreter: ProcessPoolExecutor, has_bias: bool, has_initial: bool
) -> None:
    interpreter.submit(check_operators, has_bias, has_initial).result()


def compiled_and_eager(states: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Results and gradients through one full graph, and without the compiler."""
    torch.manual_seed(5)
    case = convolution.case((9, 0, 12), states)

    def call(x, weight, bias, initial_state=None, *, segments, want_final, activation, backend):
        assert backend == "triton"
        return ours.short_convolution(x, weight, bias, activation, segments, initial_state, want_final)

    results = []
    for function in (torch.compile(call, fullgraph=True, backend="aot_eager"), call):
        case.function = function
        results.append(case.run("triton", torch.float32))
    return results[0], results[1]


@pytest.mark.parametrize("states", ["", "in out"])
def test_one_full_graph_gives_what_eager_gives(interpreter: ProcessPoolExecutor, states: str) -> None:
    found, expected = interpreter.submit(compiled_and_eager, states).result()
    assert_close(found, expected, 1e-6)


def graphs_of_batches() -> int:
    """Graphs made for batches of one to sixteen documents, whose outputs are compared with the definition's."""
    torch.manual_seed(6)
    x, weight, counter = torch.randn(40, 3), torch.randn(3, 4), CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def call(segments: Segments) -> Tensor:
        return ours.short_convolution(x, weight, None, "silu", segments, None, False)[0]

    for borders in ([0, 40], [0, 7, 40], [*range(16), 40]):
        documents = Documents.packed(borders)
        expected, _ = definition.short_convolution(x, weight, None, "silu", documents.segments, None, False)
        torch.testing.assert_close(call(documents.bounded), expected)
    return counter.frame_count


def test_one_graph_for_batches_of_different_documents(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(graphs_of_batches).result() == 1


def on_gpu(D: int, W: int) -> tuple[Segments, list[Tensor], Tensor]:
    """A stream of documents of every length from 0 to 200 tokens and a long one, of a slice of something wider."""
    torch.manual_seed(7)
    case = convolution.case((*range(201), 9000), "in", D=D, W=W)
    inputs = [z.to("cuda", torch.bfloat16) for z in case.inputs.values()]
    return stream((*range(201), 9000), "")["segments"], inputs, normal(case.tokens, D).to("cuda", torch.bfloat16)


def gradients(segments: Segments, inputs: list[Tensor], dy: Tensor, backend: str) -> list[Tensor]:
    leaves = [z.detach().requires_grad_() for z in inputs]
    x, weight, bias, initial = leaves
    run = OPERATOR.find_backends()[backend].run
    y, _ = run(x, weight, bias, "silu", segments.to(x.device), initial, False)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype), materialize_grads=True)]


@pytest.mark.gpu
@pytest.mark.parametrize("D, W", [(1024, 4), (100, 4), (130, 7), (256, 1)])
def test_long_streams_in_bfloat16_on_a_gpu(D: int, W: int) -> None:
    segments, inputs, dy = on_gpu(D, W)
    found = gradients(segments, inputs, dy, "triton")
    expected = gradients(segments, [z.double() for z in inputs], dy, "torch")
    names = ("y", "dx", "dweight", "dbias", "dinitial")
    assert all(z.dtype == torch.bfloat16 for z in found)
    assert_close(dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True)), 5e-3)


@pytest.mark.gpu
def test_every_run_gives_the_same_bits_on_a_gpu() -> None:
    segments, inputs, dy = on_gpu(1024, 4)
    first = gradients(segments, inputs, dy, "triton")
    for _ in range(5):
        again = gradients(segments, inputs, dy, "triton")
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
