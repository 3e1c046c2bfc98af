"""Segments: ids, borders and lengths tell the same story, and views are made once."""

import pytest
import torch

from torchlinearmoe.segments import Segments, bound_on_documents


def test_of_lengths():
    segments = Segments.of_lengths((3, 0, 2, 3, 0))
    assert segments.ids.tolist() == [0, 0, 0, 2, 2, 3, 3, 3] and segments.ids.dtype == torch.int32
    assert segments.borders.tolist() == [0, 3, 3, 5, 8, 8] and segments.borders.dtype == torch.int32
    assert (segments.tokens, segments.count, segments.lengths) == (8, 5, (3, 0, 2, 3, 0))


@pytest.mark.parametrize("lengths, single", [((1, 1, 1), True), ((1,), True), ((1, 0, 1), False), ((2, 1), False)])
def test_segments_of_one_token_each_are_single(lengths, single):
    assert Segments.of_lengths(lengths).single == single
    assert Segments.of_lengths(lengths).to("cpu").single == single


@pytest.mark.parametrize("lengths", [(3, 0, 2, 3), (0, 0, 4), (5,), (1, 0, 0)])
def test_of_ids_finds_the_borders_and_asks_for_the_lengths_when_they_are_wanted(lengths):
    expected = Segments.of_lengths(lengths)
    found = Segments.of_ids(expected.ids, len(lengths))
    assert torch.equal(found.borders, expected.borders) and found.borders.dtype == torch.int32
    assert found.lengths is None and not found.single
    assert found.host_lengths() == lengths == found.lengths


def test_segments_without_any_tokens():
    segments = Segments.of_lengths((0, 0))
    assert (segments.tokens, segments.count, segments.borders.tolist()) == (0, 2, [0, 0, 0])
    assert Segments.of_ids(segments.ids, 2).borders.tolist() == [0, 0, 0]


def test_views_are_made_once_a_name_and_do_not_travel():
    segments, made = Segments.of_lengths((2, 3)), []

    def make(x: Segments) -> list[int]:
        assert x is segments
        made.append(x)
        return x.borders.tolist()

    assert segments.view("one", make) is segments.view("one", make) and len(made) == 1
    segments.view("other", make)
    assert len(made) == 2
    moved = segments.to("cpu")
    assert moved.view("one", lambda x: "fresh") == "fresh"


def test_views_that_the_compiler_makes_are_not_kept_and_kept_ones_are_used():
    def counts(segments: Segments) -> torch.Tensor:
        return segments.view("counts", lambda x: x.borders.diff() * 2)

    compiled = torch.compile(counts, backend="eager", fullgraph=True)
    segments = Segments.of_lengths((2, 3))
    assert compiled(segments).tolist() == [4, 6]
    assert segments.view("counts", lambda x: "made outside") == "made outside"
    other = Segments.of_lengths((2, 3))
    other.view("counts", lambda x: torch.tensor([7]))
    assert compiled(other).tolist() == [7]


@pytest.mark.parametrize(
    "tokens, documents, bound",
    [(1, 1, 16), (4096, 16, 16), (4096, 17, 32), (8192, 32, 32), (8192, 33, 64), (8192, 129, 256), (10, 10, 16)],
)
def test_the_bound_doubles_until_the_documents_fit(tokens, documents, bound):
    assert bound_on_documents(tokens, documents) == bound
