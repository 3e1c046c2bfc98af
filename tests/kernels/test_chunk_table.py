"""The table of chunks equals a plain loop, whatever the segments."""

import pytest
import torch

from torchlinearmoe.kernels.chunk_table import CHUNK, table_of
from torchlinearmoe.segments import Segments


def looped(lengths: tuple[int, ...]) -> tuple[list[int], list[int], list[int]]:
    """First tokens and ends of the chunks, first chunks of the segments."""
    starts, ends, first, token = [], [], [0], 0
    for length in lengths:
        for start in range(0, length, CHUNK):
            starts.append(token + start)
            ends.append(token + min(start + CHUNK, length))
        token += length
        first.append(len(starts))
    places = token // CHUNK + len(lengths)
    unused = [token] * (places - len(starts))
    return starts + unused, ends + unused, first


def check(lengths: tuple[int, ...], segments: Segments) -> None:
    table = table_of(segments)
    found = table.start_M.tolist(), table.end_M.tolist(), table.first_N1.tolist()
    assert found == looped(lengths), lengths
    assert {x.dtype for x in (table.start_M, table.end_M, table.segment_M, table.first_N1)} == {torch.int32}
    used = [n for n, length in enumerate(lengths) for _ in range(0, length, CHUNK)]
    assert table.segment_M[: len(used)].tolist() == used


def test_every_length_up_to_200():
    for length in range(1, 201):
        check((length,), Segments.of_lengths((length,)))
        check((3, length, 5), Segments.of_lengths((3, length, 5)))


@pytest.mark.parametrize("lengths", [(0, 64), (64, 0), (0, 0, 70, 0, 0, 64, 0), (70, 0, 64), (1,) * 130, (0, 1)])
def test_segments_without_tokens_have_no_chunks(lengths):
    check(lengths, Segments.of_lengths(lengths))
    check(lengths, Segments.of_ids(Segments.of_lengths(lengths).ids, len(lengths)))


@pytest.mark.parametrize("seed", range(20))
def test_random_segments(seed):
    torch.manual_seed(seed)
    count = int(torch.randint(1, 30, ()))
    lengths = tuple((torch.randint(0, 200, (count,)) * (torch.rand(count) > 0.3)).tolist())
    lengths = (*lengths, 1)
    check(lengths, Segments.of_lengths(lengths))


def test_it_is_made_once():
    segments = Segments.of_lengths((3, 70))
    assert table_of(segments) is table_of(segments)
