"""What the chunks of all recurrences have in common: many of them, few tokens, and documents that do not meet."""

import importlib
from dataclasses import replace

import pytest
import torch
from cases import Case, assert_close, forced
from cases.families import FAMILIES

from torchlinearmoe.documents import Documents
from torchlinearmoe.segments import Segments

every_family = pytest.mark.parametrize("family", FAMILIES)


def draw(family: str, lengths: tuple[int, ...], states: str, **sizes: int) -> Case:
    torch.manual_seed(1)
    return FAMILIES[family](lengths, states, **sizes)


def run(case: Case, backend: str = "torch", **options) -> dict[str, torch.Tensor]:
    """Of single tokens too, which would go to the step."""
    case = replace(case, options=case.options | options)
    return forced(case.operator, backend, lambda: case.run(backend))


@every_family
@pytest.mark.parametrize("states", ["", "in", "out", "in out"])
def test_many_chunks_are_scanned(family, states, monkeypatch):
    for name in ("linear", "delta", "dplr", "slots", "quadratic"):
        monkeypatch.setattr(importlib.import_module(f"torchlinearmoe.kernels.{name}.chunked"), "CHUNK_SIZE", 4)
    case = draw(family, (141, 5, 0, 3, 14), states, H=1, K=4, V=6)
    assert_close(run(case), run(case, "reference"), 1e-9)


@every_family
@pytest.mark.parametrize("lengths", [(1,), (1, 0), (2,), (0, 17), (64,)], ids=str)
def test_streams_of_a_chunk_or_less(family, lengths):
    case = draw(family, lengths, "in out")
    assert_close(run(case), run(case, "reference"), 1e-9)


@every_family
def test_packed_documents_equal_each_document_alone(family):
    lengths = (1, 63, 20, 70)
    case = draw(family, lengths, "in out")
    packed, start = run(case), 0
    outputs = {name: x for name, x in packed.items() if name.startswith("output")}
    for n, length in enumerate(lengths):
        inputs = {}
        for name, x in case.inputs.items():
            if name.startswith(("initial", "first")):
                inputs[name] = x[n : n + 1]
            else:
                inputs[name] = x[start : start + length] if x.shape[0] == sum(lengths) else x
        alone = replace(case, inputs=inputs, options=case.options | {"segments": Segments.of_lengths((length,))})
        for name, x in run(alone).items():
            if name in outputs:
                of_all = outputs[name]
                part = of_all[start : start + length] if name == "output_0" else of_all[n : n + 1]
                torch.testing.assert_close(part, x, rtol=1e-9, atol=1e-9)
        start += length


@every_family
def test_lengths_that_only_the_device_knows_change_nothing(family):
    lengths = (30, 0, 64, 50, 7, 0)
    case = draw(family, lengths, "in out")
    ids = Segments.of_lengths(lengths).ids
    expected = run(case)
    assert_close(run(case, segments=Segments.of_ids(ids, len(lengths))), expected, 1e-12)
    assert_close(run(case, "reference", segments=Segments.of_ids(ids, len(lengths))), expected, 1e-9)


@every_family
def test_segments_beyond_the_documents_change_nothing(family):
    documents = Documents.packed([0, 30, 94, 144, 151])
    case = draw(family, documents.lengths, "")
    exact = run(case, segments=documents.segments)
    assert documents.bounded.count > 4
    assert_close(run(case, segments=documents.bounded), exact, 1e-12)
