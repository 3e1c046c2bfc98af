"""Segments as rows of a batch: split and joined, empty ones left out and put back."""

import pytest
import torch

from torchlinearmoe.kernels.rows import rows_of
from torchlinearmoe.segments import Segments


@pytest.mark.parametrize("lengths", [(4, 4), (1, 5, 2), (0, 3, 0, 3, 0), (0, 0, 2, 7)])
def test_split_and_join(lengths):
    x, filled = torch.randn(sum(lengths), 3), [length for length in lengths if length]
    rows = rows_of(Segments.of_lengths(lengths))
    assert rows.lengths == tuple(filled) and rows.even == (len(set(filled)) == 1)
    split = rows.split(x)
    assert split.shape == (len(filled), max(filled), 3)
    for row, part in zip(split, x.split(filled), strict=True):
        assert torch.equal(row[: len(part)], part) and not row[len(part) :].any()
    assert torch.equal(rows.join(split), x)


def test_borders_leave_out_empty_segments_on_the_device_and_the_host():
    rows = rows_of(Segments.of_lengths((0, 3, 0, 4, 0)))
    assert rows.borders.tolist() == rows.borders_host.tolist() == [0, 3, 7]
    assert rows.borders.dtype == rows.borders_host.dtype == torch.int64


def test_segments_without_tokens_keep_their_states():
    rows = rows_of(Segments.of_lengths((0, 3, 0, 4)))
    states, final = torch.randn(4, 2), torch.randn(2, 2)
    assert torch.equal(rows.select(states), states[[1, 3]])
    restored = torch.stack([states[0], final[0], states[2], final[1]])
    assert torch.equal(rows.restore(final, states), restored)
    none = torch.zeros(2)
    assert torch.equal(rows.restore(final, None), torch.stack([none, final[0], none, final[1]]))


def test_states_are_handed_on_as_they_are_where_all_segments_have_tokens():
    rows = rows_of(Segments.of_lengths((2, 3)))
    states = torch.randn(2, 5)
    assert rows.select(states) is states and rows.restore(states, None) is states


def test_rows_are_made_once_and_where_only_the_device_knows_the_lengths_too():
    segments = Segments.of_ids(torch.tensor([1, 1, 3], dtype=torch.int32), 5)
    rows = rows_of(segments)
    assert rows.lengths == (2, 1) and rows.count == 5 and rows_of(segments) is rows
