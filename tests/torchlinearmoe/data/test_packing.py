"""Samples and micro-batches, written out by hand."""

import pytest
import torch

from torchlinearmoe.data.packing import IGNORED, Samples, collate
from torchlinearmoe.documents import Documents


def spell(ids):
    marks = {26: "^", 27: "<", 28: "_", IGNORED: "."}
    return "".join(marks.get(int(token), chr(ord("a") + max(int(token), 0))) for token in ids)


def test_samples_by_hand(make_stream):
    """The stream is ^abc^defg^hi^."""
    samples = Samples(make_stream(["abc", "defg", "hi"]), 4)
    assert len(samples) == 3
    assert [(spell(s.tokens), spell(s.labels), s.starts) for s in map(samples.__getitem__, range(3))] == [
        ("^abc", "abc^", [0]),
        ("^def", "defg", [0]),
        ("g^hi", "^hi^", [0, 1]),
    ]


def test_samples_of_documents_with_a_begin_and_an_end(make_stream, begun):
    """The stream is <abc^<^<defg^: a document starts at its begin, the end belongs to the one it ends."""
    stream = make_stream(["abc", "", "defg"], begun)
    assert spell(stream.read(0, len(stream))) == "<abc^<^<defg^"
    assert [(spell(s.tokens), spell(s.labels), s.starts) for s in map(Samples(stream, 5).__getitem__, range(2))] == [
        ("<abc^", "abc^<", [0]),
        ("<^<de", "^<def", [0, 2]),
    ]
    last = Samples(stream, 5, tail=True)[2]
    assert (spell(last.tokens), spell(last.labels), last.starts, last.filled) == ("fg___", "g^...", [0, 2], 2)
    assert spell(Samples(stream, 5).ignored().tokens) == "_____"


def test_a_tail_is_left_out_or_filled_up(make_stream):
    """The stream is ^abc^de^, 7 targets."""
    stream = make_stream(["abc", "de"])
    assert len(Samples(stream, 5)) == 1
    tail = Samples(stream, 5, tail=True)
    assert len(tail) == 2
    assert (spell(tail[0].tokens), spell(tail[0].labels), tail[0].starts) == ("^abc^", "abc^d", [0, 4])
    assert (spell(tail[1].tokens), spell(tail[1].labels), tail[1].starts) == ("de^^^", "e^...", [0, 2])
    assert len(Samples(stream, 7)) == len(Samples(stream, 7, tail=True)) == 1
    assert len(Samples(stream, 8)) == 0


def test_documents_of_one_marker_each(make_stream):
    """Texts may be empty of tokens: ^^^a^."""
    sample = Samples(make_stream(["", "", "a"]), 4)[0]
    assert (spell(sample.tokens), spell(sample.labels), sample.starts) == ("^^^a", "^^a^", [0, 1, 2])


@pytest.mark.parametrize("length", [1, 3, 7, 64])
def test_labels_are_the_stream(make_stream, length):
    torch.manual_seed(length)
    texts = ["abcdefghijklmnopqrstuvwxyz"[: int(n)] for n in torch.randint(0, 20, (40,))]
    stream = make_stream(texts)
    ids = stream.read(0, len(stream)).tolist()
    samples = Samples(stream, length, tail=True)
    inputs, labels = [], []
    for i in range(len(samples)):
        sample = samples[i]
        valid = sample.labels != IGNORED
        inputs += sample.tokens[valid].tolist()
        labels += sample.labels[valid].tolist()
        markers = [0] + [t for t in range(1, int(valid.sum())) if sample.tokens[t] == 26]
        assert sample.starts == markers + ([int(valid.sum())] if not valid.all() else [])
    assert inputs == ids[:-1] and labels == ids[1:]


def test_micro_batch_is_flat(make_stream):
    samples = Samples(make_stream(["abc", "de"]), 5, tail=True)
    batch = collate([samples[0], samples[1], samples.ignored()])
    assert spell(batch.tokens.tolist()) == "^abc^de^^^^^^^^" and batch.tokens.dtype == torch.int64
    assert spell(batch.labels.tolist()) == "abc^de^........" and batch.labels.dtype == torch.int64
    assert batch.cu_seqlens == [0, 4, 5, 7, 10, 15]
    assert (batch.row_length, batch.num_sequences, batch.valid_tokens) == (5, 3, 7)
    assert batch.filled == (5, 2, 0) and batch.counted_tokens == 7
    # Whether rows can have padding is a matter of all samples of a stream, not of each.
    assert collate([samples[0]]).filled == (5,) and collate([Samples(samples.stream, 5)[0]]).filled is None
    documents = batch.documents("cpu")
    assert isinstance(documents, Documents)
    assert documents.positions.tolist() == [0, 1, 2, 3, 0, 0, 1, 0, 1, 2, 0, 1, 2, 3, 4]
    assert (documents.row_length, documents.num_rows) == (5, 3)
    moved = batch.to("meta")
    assert moved.tokens.device.type == moved.labels.device.type == "meta" and moved.valid_tokens == 7
