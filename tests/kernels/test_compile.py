"""The operators trace into one graph, forward and backward, and one graph serves every batch."""

import pytest
import torch
from cases import Case, assert_close, convolution, token_shift
from cases.families import FAMILIES
from torch._dynamo.testing import CompileCounterWithBackend

from torchlinearmoe.documents import Documents

ALL = FAMILIES | {"convolution": convolution.case, "token_shift": token_shift.case}
OWN_FILE = ("scalar", "diagonal", "grouped_delta", "dplr", "slots", "taylor", "convolution", "token_shift")
"""One family of each file of chunks; tracing takes seconds. kda is plain below, with states."""
plain_and_slow = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name not in OWN_FILE)) for name in ALL]
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def compare(case: Case) -> None:
    expected = case.run("torch", torch.float32)
    case.function = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    assert_close(case.run("torch", torch.float32), expected, 1e-4)


@plain_and_slow
def test_one_graph(family):
    torch.manual_seed(7)
    compare(ALL[family]((100, 0, 70), ""))


@pytest.mark.parametrize(
    "family",
    ["constant", "kda", "convolution", "token_shift"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("diagonal", "gated_delta", "dplr", "slots", "taylor")],
)
def test_one_graph_with_states_in_and_out(family):
    torch.manual_seed(8)
    compare(ALL[family]((40, 0, 31), "in out"))


def batches(tokens: int, count: int) -> list[Documents]:
    """Batches of one to sixteen documents."""
    found = []
    for n in range(count):
        inside = torch.randperm(tokens - 1)[: n % 16] + 1
        found.append(Documents.packed([0, *sorted(inside.tolist()), tokens]))
    return found


@pytest.mark.parametrize(
    "family, prepared", [("scalar", True), ("scalar", False), ("taylor", True), ("convolution", False)]
)
def test_one_graph_for_batches_of_different_documents(family, prepared):
    torch.manual_seed(9)
    case = ALL[family]((128,), "")
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(case.function, fullgraph=True, backend=counter)
    backend = case.operator.find_backends()["torch"]
    inputs = {name: x.float().requires_grad_() for name, x in case.inputs.items()}
    for documents in batches(128, 50):
        segments = documents.bounded
        if prepared:
            assert backend.prepare is not None
            backend.prepare(segments)
        options = case.options | {"segments": segments}
        o, _ = function(**inputs, **options)
        o.sum().backward()
        exact, _ = case.function(**inputs, **(options | {"segments": documents.segments}))
        torch.testing.assert_close(o, exact)
    assert counter.frame_count == 1
