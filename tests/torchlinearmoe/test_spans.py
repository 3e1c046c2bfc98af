"""Which documents pass from span to span, seen by each rank alone."""

import random

import pytest
import torch
import torch.distributed as dist

from torchlinearmoe.documents import Documents
from torchlinearmoe.parallel.exchange.tails import _sources
from torchlinearmoe.planning.world import pretended_world
from torchlinearmoe.spans import Exchange, Spans, cut_spans


def spans_of(borders: list[int], row_length: int, size: int, exchange: Exchange | None = None) -> list[Spans]:
    """Of every rank."""
    found = []
    for rank in range(size):
        with pretended_world(size, rank):
            assert dist.group.WORLD is not None
            found.append(cut_spans(borders, row_length, dist.group.WORLD, exchange=exchange))
    return found


def test_the_picture_of_the_module():
    # a a a a | a a a a | a b b c
    spans = spans_of([0, 9, 11, 12], 12, 3)
    assert [s.enters_R.tolist() for s in spans] == [[False], [True], [True]]
    assert spans[0].through_WR.tolist() == [[False], [True], [False]]
    assert spans[0].last_count_WR is not None
    assert spans[0].last_count_WR.tolist() == [[4], [4], [1]]
    assert [s.borders for s in spans] == [(0, 4), (0, 4), (0, 1, 3, 4)]
    assert [s.history for s in spans] == [(0,), (4,), (8,)]
    assert [s.earliest for s in spans] == [0, 0, 0]
    assert spans[2].reaches_WR.tolist() == [[True], [True], [False]]
    assert spans[2].positions.tolist() == [8, 0, 1, 0]
    assert all(s.crossed and s.passed for s in spans)
    assert spans[2].row_lengths() == [(1, 2, 1)]


def test_what_ends_with_a_span_does_not_pass_through_it():
    assert all(s.crossed and not s.passed for s in spans_of([0, 8, 12], 12, 3))
    assert not any(s.passed for s in spans_of([0, 8], 8, 2))


def test_nothing_crosses_where_documents_end_with_their_spans():
    for spans in spans_of([0, 4, 6, 8, 12], 12, 3):
        assert not spans.crossed and spans.earliest == spans.rank and spans.history == (0,)


@pytest.mark.parametrize("seed", range(8))
def test_random_documents_are_cut_as_a_token_by_token_reading_cuts_them(seed: int):
    chooser = random.Random(seed)
    size, rows, length = chooser.choice([2, 3, 4]), chooser.choice([1, 2, 3]), chooser.choice([1, 2, 5, 7])
    row = size * length
    starts = {r * row for r in range(rows)} | {t for t in range(rows * row) if chooser.random() < 0.15}
    borders = [*sorted(starts), rows * row]
    document = [max(s for s in starts if s <= t) for t in range(rows * row)]  # its first token
    for spans in spans_of(borders, row, size):
        tokens = [r * row + spans.rank * length + t for r in range(rows) for t in range(length)]
        assert spans.positions.tolist() == [t - document[t] for t in tokens]
        pieces = Documents.packed(spans.borders, length)
        assert [document[t] for t in tokens] == [document[tokens[spans.borders[n]]] for n in pieces.ids.tolist()]
        assert spans.row_lengths() == [
            tuple(pieces.ids[r * length : (r + 1) * length].unique_consecutive(return_counts=True)[1].tolist())
            for r in range(rows)
        ]
        inner = [r * row + w * length for r in range(rows) for w in range(1, size - 1)]
        assert spans.passed == any(document[begin + length] < begin for begin in inner)
        for r in range(rows):
            first, last = tokens[r * length], tokens[(r + 1) * length - 1]
            assert pieces.ids[r * length] == spans.first_R[r] and pieces.ids[(r + 1) * length - 1] == spans.last_R[r]
            assert spans.enters_R[r] == (document[first] != first)
            assert spans.history[r] == first - document[first]
            assert spans.in_last(pieces.ids).view(rows, length)[r].tolist() == [
                document[t] == document[last] for t in tokens[r * length : (r + 1) * length]
            ]
            for w in range(size):
                begin, end = r * row + w * length, r * row + (w + 1) * length - 1
                reaches = w < spans.rank and document[end] == document[first]
                assert spans.reaches_WR[w, r] == reaches
                assert spans.through_WR[w, r] == (document[end] < begin)
                assert spans.last_count_WR is not None
                assert spans.last_count_WR[w, r] == end + 1 - max(begin, document[end])
                assert w >= spans.earliest or not reaches


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_inputs_before_a_span_are_the_last_ones_of_all_ranks_that_reach_it(count: int):
    generator = torch.Generator().manual_seed(count)
    reaches = torch.randint(2, (4, 6), generator=generator).bool()
    held = torch.randint(6, (4, 6), generator=generator)
    chosen = _sources(reaches, held, count)
    for row in range(6):
        # What a rank hands on: its places from the right, numbered over all ranks.
        line = [
            w * count + count - 1 - age
            for w in range(4)
            if reaches[w, row]
            for age in reversed(range(min(int(held[w, row]), count)))
        ][-count:]
        expected = torch.zeros(count, 4 * count, dtype=torch.bool)
        for place, source in enumerate(line, count - len(line)):
            expected[place, source] = True
        assert torch.equal(chosen[row], expected)


def test_heads_are_traded_where_they_divide_or_as_asked():
    for choice, expected in (("auto", [True, False]), ("heads", [True, True]), ("gather", [False, False])):
        spans = spans_of([0, 8], 8, 2, Exchange(attention=choice))[0]
        assert [spans.by_heads(heads) for heads in (4, 3)] == expected


def test_ranks_must_divide_the_rows():
    with pytest.raises(ValueError, match="^rows of 9 tokens: 2 context-parallel ranks must divide them"):
        spans_of([0, 9], 9, 2)
