"""The held-out split: whole documents, always the same ones."""

import json
import pickle
import random

import pytest

from torchlinearmoe.data.splits import open_splits
from torchlinearmoe.data.store import write_store

WORDS = [
    "".join(random.Random(i).choices("abcdefghij", k=1 + i % 9)) + "klmnopqrst"[i % 10] * (i // 10) for i in range(200)
]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts_of(stream, letters):
    ids = stream.read(0, len(stream)).tolist()
    assert not ids or (ids[0] == 26 and ids[-1] == 26)
    documents, current = [], []
    for token in ids[1:]:
        if token == 26:
            documents.append(letters.decode(current))
            current = []
        else:
            current.append(token)
    return documents


def open_texts(tmp_path, letters, texts, fraction=0.3):
    path = write(tmp_path / "a.jsonl", texts)
    return open_splits([path], tokenizer=letters, validation_fraction=fraction, cache=tmp_path / "cache")


def test_the_splits_share_out_the_documents_in_order(tmp_path, letters):
    splits = open_texts(tmp_path, letters, WORDS)
    train, validation = texts_of(splits.train, letters), texts_of(splits.validation, letters)
    held_out = set(validation)
    assert train == [word for word in WORDS if word not in held_out]
    assert validation == [word for word in WORDS if word in held_out]
    assert (len(train), len(validation)) == (splits.train.num_documents, splits.validation.num_documents)
    assert 30 < len(validation) < 90


def test_a_document_is_held_out_whatever_comes_with_it(tmp_path, letters):
    before = set(texts_of(open_texts(tmp_path, letters, WORDS).validation, letters))
    others = ["z" * n for n in range(1, 50)]
    mixed = [*others, *reversed(WORDS), *WORDS[:20]]
    splits = open_texts(tmp_path, letters, mixed)
    after = texts_of(splits.validation, letters)
    assert set(after) - set(others) == before
    assert not set(after) & set(texts_of(splits.train, letters)), "copies of a text stay together"


def test_a_larger_fraction_holds_out_more_of_the_same(tmp_path, letters):
    small = texts_of(open_texts(tmp_path, letters, WORDS, 0.1).validation, letters)
    large = texts_of(open_texts(tmp_path, letters, WORDS, 0.5).validation, letters)
    assert set(small) < set(large)
    nothing = open_texts(tmp_path, letters, WORDS, 0)
    assert len(nothing.validation) == 0 and texts_of(nothing.train, letters) == WORDS


def test_every_read_is_a_piece_of_the_whole(tmp_path, letters):
    stream = open_texts(tmp_path, letters, WORDS).train
    whole = stream.read(0, len(stream))
    generator = random.Random(0)
    for _ in range(200):
        start, stop = sorted(generator.choices(range(len(stream) + 1), k=2))
        assert stream.read(start, stop).tolist() == whole[start:stop].tolist()


def test_by_tokens_the_last_share_is_held_out_of_one_document_too(tmp_path, letters, begun):
    text = "".join(random.Random(5).choices("abcdefghij", k=97))
    for tokenizer, texts in ((letters, [text]), (begun, [text]), (letters, WORDS)):
        path = write(tmp_path / "a.jsonl", texts)
        options = {"tokenizer": tokenizer, "cache": tmp_path / "cache"}
        whole = open_splits([path], validation_fraction=0, **options).train
        splits = open_splits([path], validation_fraction=0.1, split="tokens", **options)
        ids, cut = whole.read(0, len(whole)).tolist(), len(whole) - round(0.1 * len(whole))
        for stream, expected in ((splits.train, ids[:cut]), (splits.validation, ids[cut:])):
            assert stream.read(0, len(stream)).tolist() == expected
            copied = pickle.loads(pickle.dumps(stream))
            assert copied.read(3, len(stream) - 1).tolist() == expected[3:-1]
            samples = stream.samples(4, tail=True)
            inputs = [token for i in range(len(samples)) for token in samples[i].tokens[: samples[i].filled].tolist()]
            assert inputs == expected[:-1]
        counts = (splits.train.num_documents, splits.validation.num_documents)
        begins = [place for place, token in enumerate(ids[:-1]) if token == whole.start]
        assert counts == (sum(b < cut for b in begins), sum(b >= cut for b in begins) + (cut not in begins))
        nothing = open_splits([path], validation_fraction=0, split="tokens", **options)
        assert len(nothing.validation) == nothing.validation.num_documents == 0
        assert nothing.train.read(0, len(whole)).tolist() == ids


def test_prepared_folders_are_taken_as_they_are(tmp_path, letters):
    folders = [
        write_store(tmp_path / name, texts, letters).folder for name, texts in [("a", ["ab"]), ("b", ["c", "d"])]
    ]
    write(tmp_path / "text.jsonl", ["ef"])
    splits = open_splits([tmp_path], tokenizer=letters, validation_fraction=0, cache=tmp_path / "cache")
    assert texts_of(splits.train, letters) == ["ef", "ab", "c", "d"]
    splits = open_splits(folders[::-1], tokenizer=letters, validation_fraction=0)
    assert texts_of(splits.train, letters) == ["c", "d", "ab"]
    letters.fingerprint = "other"
    with pytest.raises(ValueError, match="'.*a' was tokenised by another tokenizer than .*letters"):
        open_splits([tmp_path / "a"], tokenizer=letters, validation_fraction=0)


def test_streams_travel_to_other_processes(tmp_path, letters):
    stream = open_texts(tmp_path, letters, WORDS).train
    copy = pickle.loads(pickle.dumps(stream))
    assert copy.read(0, len(copy)).tolist() == stream.read(0, len(stream)).tolist()


def test_empty_splits_are_refused(tmp_path, letters):
    with pytest.raises(ValueError, match=r"validation_fraction = 0.0001 leaves no document \(of 3\) for validation"):
        open_texts(tmp_path, letters, WORDS[:3], 0.0001)
    with pytest.raises(ValueError, match=r"validation_fraction = 0.9999 leaves no document \(of 3\) to train on"):
        open_texts(tmp_path, letters, WORDS[:3], 0.9999)
    with pytest.raises(ValueError, match="or data.validation_split = 'tokens' to hold out its last tokens"):
        open_texts(tmp_path, letters, WORDS[:1], 0.05)
    path = write(tmp_path / "a.jsonl", ["abc"])
    with pytest.raises(ValueError, match="validation_fraction = 0.2 leaves 4 tokens to train on and 1 for validation"):
        open_splits([path], tokenizer=letters, validation_fraction=0.2, split="tokens", cache=tmp_path / "cache")
    for fraction in (-0.1, 1.0):
        with pytest.raises(ValueError, match="at least 0 and below 1"):
            open_texts(tmp_path, letters, WORDS, fraction)


def test_the_corpus_that_ships_has_both_splits(corpus, tokenizer):
    assert (corpus.train.num_documents, corpus.validation.num_documents) == (250, 10)
    assert tokenizer.decode(corpus.train.read(1, 12).tolist()).startswith("Matthew 1\n\nThe book")
