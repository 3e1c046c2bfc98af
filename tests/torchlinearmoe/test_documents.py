"""Documents: borders on the host and on the device tell the same story."""

import pytest
import torch

from torchlinearmoe.documents import Documents


def test_hand_made_stream():
    documents = Documents.packed([0, 3, 5, 8])
    assert documents.cu_seqlens.tolist() == [0, 3, 5, 8] and documents.cu_seqlens.dtype == torch.int32
    assert documents.ids.tolist() == [0, 0, 0, 1, 1, 2, 2, 2] and documents.ids.dtype == torch.int32
    assert documents.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2] and documents.positions.dtype == torch.int64
    assert documents.lengths == (3, 2, 3)
    assert (documents.row_length, documents.num_rows) == (8, 1)
    assert (documents.num_documents, documents.num_tokens, documents.max_length) == (3, 8, 3)


@pytest.mark.parametrize("seed", range(3))
def test_ids_and_positions_follow_from_random_lengths(seed):
    torch.manual_seed(seed)
    lengths = torch.randint(1, 9, (int(torch.randint(1, 30, ())),)).tolist()
    borders = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    documents = Documents.packed(borders)
    assert documents.ids.tolist() == [n for n, length in enumerate(lengths) for _ in range(length)]
    assert documents.positions.tolist() == [p for length in lengths for p in range(length)]


def test_batch_is_packed_with_equal_lengths():
    batch, packed = Documents.batch(3, 5), Documents.packed([0, 5, 10, 15], row_length=5)
    for name in ("cu_seqlens", "ids", "positions"):
        assert torch.equal(getattr(batch, name), getattr(packed, name))
    assert (batch.lengths, batch.row_length, batch.num_rows) == (packed.lengths, packed.row_length, 3)


@pytest.mark.parametrize(
    ("borders", "row_length", "match"),
    [
        ([1, 4], None, "start at 0"),
        ([0], None, "at least one document"),
        ([0, 3, 3, 4], None, "strictly increase"),
        ([0, 4, 8], 3, "row_length = 3"),
        ([0, 3, 5, 8], 4, "crosses token 4"),
    ],
)
def test_impossible_borders_are_refused(borders, row_length, match):
    with pytest.raises(ValueError, match=match):
        Documents.packed(borders, row_length=row_length)


def test_empty_batch_is_refused():
    with pytest.raises(ValueError, match="no tokens"):
        Documents.batch(0, 4)


def test_segments_are_the_documents():
    documents = Documents.packed([0, 3, 5, 8])
    segments = documents.segments
    assert segments.ids is documents.ids and segments.borders is documents.cu_seqlens
    assert segments.lengths == (3, 2, 3) and not segments.single and documents.segments is segments
    assert Documents.batch(4, 1).segments.single


def test_bounded_segments_tell_no_shape_how_many_documents_there_are():
    shapes = set()
    for count in range(1, 17):
        documents = Documents.packed([*range(count), 64])
        bounded = documents.bounded
        shapes.add((tuple(bounded.ids.shape), tuple(bounded.borders.shape)))
        assert bounded.ids is documents.ids and not bounded.single
        assert bounded.borders.tolist() == [*range(count), *[64] * (17 - count)]
        assert bounded.borders.dtype == torch.int32
        assert bounded.host_lengths() == (*documents.lengths, *(0,) * (16 - count))
    assert shapes == {((64,), (17,))}
    assert Documents.packed(range(18)).bounded.count == 32


@pytest.mark.gpu
def test_the_gpu_is_not_waited_for():
    lengths = torch.randint(1, 100, (500,)).tolist()
    borders = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    expected = Documents.packed(borders)
    torch.zeros(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        documents = Documents.packed(borders, device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in ("cu_seqlens", "ids", "positions"):
        assert torch.equal(getattr(documents, name).cpu(), getattr(expected, name))


def test_padding_at_the_end_of_rows_is_told_wherever_the_stream_is_cut() -> None:
    documents = Documents.packed([0, 3, 4, 8, 12], 4, filled=(3, 4, 0))
    assert documents.counted is not None and Documents.packed([0, 4]).counted is None
    assert documents.counted.int().tolist() == [1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0]
    assert documents.sequence_ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert documents.count_sequences() == [3, 4, 0]
    assert [documents.count_sequences(part, 2) for part in range(2)] == [[3, 2, 0], [0, 2, 0]]
    prompts = Documents.prompts([3, 1])
    assert prompts.sequence_ids.tolist() == [0, 0, 0, 1] and prompts.count_sequences() == [3, 1]
    with pytest.raises(ValueError, match=r"filled = \[5\]: needs 1 numbers from 0 to 4"):
        Documents.packed([0, 4], filled=[5])
