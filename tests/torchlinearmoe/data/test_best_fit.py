"""Best fit: documents whole where they fit, every label once, an order that is a function of the sample's number."""

import pickle

import numpy as np
import pytest

from torchlinearmoe.data import best_fit
from torchlinearmoe.data.best_fit import CUT, GOES_ON, WHOLE, Pieces, WindowOrder, pack
from torchlinearmoe.data.loader import build_loader
from torchlinearmoe.data.mixture import MixedStream
from torchlinearmoe.data.packing import IGNORED
from torchlinearmoe.data.splits import TokenStream, open_splits
from torchlinearmoe.data.store import write_store

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def spell(ids):
    marks = {26: "^", 27: "<", 28: "_", IGNORED: "."}
    return "".join(marks.get(int(token), chr(ord("a") + max(int(token), 0))) for token in ids)


def texts(seed, count=300, longest=20):
    draw = np.random.default_rng(seed)
    lengths = np.minimum(draw.lognormal(np.log(5), 0.8, count).astype(int), longest)
    return ["".join(draw.choice(list(ALPHABET), n)) for n in lengths]


@pytest.fixture
def stream_of(tmp_path, letters):
    """Documents -> a stream packed by best fit, of a few folders; `options` are those of `TokenStream`."""
    made = 0

    def make(documents, tokenizer=letters, folders=3, keys=(0, 1 << 64), **options):
        nonlocal made
        stores = []
        for part in np.array_split(np.arange(len(documents)), folders):
            made += 1
            stores.append(write_store(tmp_path / f"{made}", [documents[i] for i in part], tokenizer))
        return TokenStream(stores, keys, packing="best_fit", **options)

    return make


@pytest.fixture
def small_windows(monkeypatch):
    """Windows of a few documents, of which few are looked at."""
    monkeypatch.setattr(best_fit, "WINDOW", 20)
    monkeypatch.setattr(best_fit, "LEAST_SEQUENCES", 4)
    monkeypatch.setattr(best_fit, "LEAST_LOOKED_AT", 3)
    monkeypatch.setattr(best_fit, "LOOKED_AT", 60)
    monkeypatch.setattr(best_fit, "GROUP", 3)


def pieces_of(samples):
    """What each sample holds: (inputs, labels) of its documents."""
    for index in range(len(samples)):
        sample = samples[index]
        assert sample.tokens.shape == sample.labels.shape == (samples.length,) and sample.starts[0] == 0
        edges = [*[start for start in sample.starts if start < sample.filled], sample.filled]
        assert sorted(set(edges)) == edges or sample.filled == 0
        assert (sample.labels[sample.filled :] == IGNORED).all() and (sample.labels[: sample.filled] != IGNORED).all()
        assert sample.filled == samples.length or sample.starts[-1] == sample.filled
        for start, stop in zip(edges, edges[1:]):
            yield spell(sample.tokens[start:stop]), spell(sample.labels[start:stop])


def test_by_hand(stream_of):
    """The example of the module: the longest first, each where it leaves the least room."""
    stream = stream_of(["abcd", "ef", "ghi", "j", "klmnopq"], folders=2)
    samples = stream.samples(6)
    found = [
        (spell(s.tokens), spell(s.labels), s.starts, s.filled, s.begun, s.cut)
        for s in map(samples.__getitem__, range(4))
    ]
    assert len(samples) == 4 and found == [
        ("^klmno", "klmnop", [0], 6, 1, 1),
        ("^abcd^", "abcd^.", [0, 5], 5, 1, 0),
        ("^ghi^j", "ghi^j^", [0, 4], 6, 2, 0),
        ("^efpq^", "ef^q^.", [0, 3, 5], 5, 1, 0),
    ]
    assert stream.note(6) == (
        "data.packing = 'best_fit': 20.00% of documents are cut ('concatenate': 40.00%), "
        "8.33% of 4 sequences is padding"
    )
    assert spell(stream.samples(6, tail=True)[0].tokens) == "^abcd^", "held-out text is read one after the other"


def test_documents_with_a_begin_and_an_end(stream_of, begun):
    """The last token of a document is only predicted."""
    stream = stream_of(["abc", "", "defghijkl"], begun, folders=1)
    samples = stream.samples(5)
    assert sorted(pieces_of(samples)) == [("<", "^"), ("<abc", "abc^"), ("<defg", "defgh"), ("hijkl", "ijkl^")]
    assert len(samples) == 3 and spell(samples[2].tokens) == "<abc<" and samples.ignored().filled == 0


@pytest.mark.parametrize("length", [3, 8, 21, 400])
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("part", [False, True])
def test_every_label_is_in_one_sample_and_documents_that_fit_are_whole(
    stream_of, letters, begun, length, begins, small, part, request
):
    if small:
        request.getfixturevalue("small_windows")
    documents = texts(length)
    keys = (1 << 62, 1 << 64) if part else (0, 1 << 64)
    stream = stream_of(documents, begun if begins else letters, keys=keys)
    samples = stream.samples(length)
    marker, ids = "<" if begins else "^", spell(stream.read(0, len(stream)))
    whole = [marker + text for text in ids.split(marker)[1:]]
    whole = whole if begins else whole[:-1]  # the last marker ends the last document
    labels = [text[1:] if begins else text[1:] + "^" for text in whole]
    expected = [
        (text[i : i + length][: len(label) - i], label[i : i + length])
        for text, label in zip(whole, labels)
        for i in range(0, len(label), length)
    ]
    found = list(pieces_of(samples))
    pairs, expected_pairs = (sorted(pair for piece in some for pair in zip(*piece)) for some in (found, expected))
    assert pairs == expected_pairs, "every label is there once"
    here = [samples[i] for i in range(len(samples))]
    assert sum(sample.begun for sample in here) == stream.num_documents == len(whole)
    cut = sum(inputs[0] == marker and label[-1] != "^" for inputs, label in found)
    assert sum(sample.cut for sample in here) == cut
    if samples.exact:
        assert sorted(found) == sorted(expected) and cut == sum(len(label) > length for label in labels)
    else:
        assert cut <= sum(len(label) > length for label in labels) + 0.1 * len(whole)


@pytest.mark.parametrize("seed", range(4))
def test_less_padding_than_first_come_first_served(stream_of, seed):
    samples = stream_of(texts(seed, 400, 30)).samples(32)
    places = sum(samples[i].filled for i in range(len(samples)))
    assert len(samples) <= 1.01 * places / 32 + 1


@pytest.mark.parametrize("seed", range(5))
def test_windows_with_too_few_or_too_many_sequences_keep_every_place(seed):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 11, 50)
    starts = np.cumsum(lengths) - lengths
    kinds = draw.choice([GOES_ON, WHOLE, CUT], 50).astype(np.int8)
    pieces = Pieces(starts, lengths, kinds)
    needed = len(pack(pieces, 10).firsts) - 1
    for count in (-(-int(lengths.sum()) // 10), needed, needed + 7, 60):
        window = pack(pieces, 10, count)
        assert (
            len(window.firsts) == count + 1 and window.firsts[0] == 0 and window.firsts[-1] == len(window.pieces.starts)
        )
        filled = np.add.reduceat(np.append(window.pieces.lengths, 0), window.firsts[:-1]) * (np.diff(window.firsts) > 0)
        assert filled.max() <= 10 and filled.sum() == lengths.sum()
        covered = np.concatenate([np.arange(s, s + n) for s, n in zip(window.pieces.starts, window.pieces.lengths)])
        assert sorted(covered) == list(range(lengths.sum()))
        assert (window.pieces.kinds != GOES_ON).sum() == (kinds != GOES_ON).sum(), "a document begins once"
        assert (np.diff(window.firsts) > 0).sum() == min(count, 50)
        first_pieces = np.isin(window.pieces.starts, starts)
        assert (window.pieces.kinds[~first_pieces] == GOES_ON).all()
        for start, length, kind in zip(*window.pieces):
            if kind == WHOLE:
                assert lengths[starts == start] == length


def test_an_epoch_is_every_sequence_once_and_epochs_and_streams_are_unlike():
    counts = np.array([5, 0, 7, 1, 12, 3, 9, 4, 40, 2])
    order = WindowOrder(counts, seed=1, first=6)
    total = int(counts.sum())
    epochs = [[order[g] for g in range(6 + e * total, 6 + (e + 1) * total)] for e in range(3)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs) and len(set(map(tuple, epochs))) == 3
    again = WindowOrder(counts, seed=1, first=6)
    assert [again[g] for g in range(6 + total, 6 + 2 * total)] == epochs[1], "whatever was asked for before"
    others = [WindowOrder(counts, seed=2, first=6), WindowOrder(counts, 1, 6, (1,)), WindowOrder(counts, 1, 5)]
    assert all([other[g] for g in range(6, 6 + total)] != epochs[0] for other in others)


def test_the_order_reads_a_few_windows_at_a_time(monkeypatch):
    monkeypatch.setattr(best_fit, "GROUP", 4)
    counts = np.full(40, 10)
    order = WindowOrder(counts, seed=0)
    windows = np.array([order[g] // 10 for g in range(400)])
    groups = [set(part) for part in windows.reshape(10, 40)]
    assert all(len(group) == 4 for group in groups) and len(set.union(*groups)) == 40
    assert len(set(windows[:8])) > 2, "shuffled together"
    assert sorted(map(min, groups)) != list(map(min, groups))


def steps(stream, ranks, start=0, stop=6, workers=0):
    loaders = [
        build_loader(
            stream,
            sequence_length=8,
            micro_batch_size=1,
            samples_per_step=4,
            seed=5,
            rank=rank,
            ranks=ranks,
            start_step=start,
            stop_step=stop,
            workers=workers,
        )
        for rank in range(ranks)
    ]
    return [
        [(tuple(b.tokens.tolist()), b.filled, tuple(b.cu_seqlens)) for turn in zip(*parts) for b in turn]
        for parts in zip(*loaders)
    ]


@pytest.mark.parametrize("mixed", [False, True])
def test_batches_are_a_function_of_the_step_on_any_number_of_ranks(stream_of, small_windows, mixed):
    stream = stream_of(texts(0))
    if mixed:
        stream = MixedStream({"a": stream, "b": stream_of(texts(1, 100))}, [3, 1])
    whole = steps(stream, 1)
    assert steps(stream, 4) == whole and steps(stream, 2, start=2) == whole[2:]
    assert steps(stream, 1, stop=9)[:6] == whole and steps(stream, 1, workers=2) == whole
    assert steps(pickle.loads(pickle.dumps(stream)), 1) == whole
    assert all(filled is not None for step in whole for _, filled, _ in step), "padding is told of every batch"
    if mixed:
        note = str(stream.note(8))
        assert "a: data.packing = 'best_fit'" in note and "b: data.packing" in note


def test_figures_of_a_step(stream_of, make_stream):
    for stream in (
        stream_of(["abcd", "ef", "ghi", "j", "klmnopq"]),
        make_stream(["abcd", "ef", "ghi", "j", "klmnopq"]),
    ):
        count = len(stream.samples(6))
        loader = build_loader(stream, sequence_length=6, micro_batch_size=1, samples_per_step=count, seed=0)
        next(iter(loader))
        figures = loader.packed.figures()
        best = count == 4
        assert loader.packed.begun == 5 and loader.packed.cut == (1 if best else 2)
        assert figures == {
            "data/cut_documents": pytest.approx(0.2 if best else 0.4),
            "data/padding": pytest.approx(2 / 24 if best else 0),
        }


def test_short_documents_are_left_out(stream_of, letters, tmp_path):
    documents = texts(3)
    stream = stream_of(documents, min_length=6)
    long = [text for text in documents if len(text) >= 5]
    assert stream.num_documents == len(long) and stream.left_out == len(documents) - len(long) > 0
    assert spell(stream.read(0, len(stream))) == "".join(f"^{text}" for text in long) + "^"
    assert stream.note(8).startswith(
        f"data.min_length = 6: {stream.left_out} shorter documents are left out; data.pack"
    )
    write_store(tmp_path / "all", documents, letters)
    splits = open_splits([tmp_path / "all"], tokenizer=letters, validation_fraction=0.3, min_length=6)
    assert splits.train.num_documents + splits.validation.num_documents == len(long)
    assert splits.train.note(8) == f"data.min_length = 6: {splits.train.left_out} shorter documents are left out"
    with pytest.raises(
        ValueError, match=r"^data\.min_length = 50: no document has so many tokens; lower it, or bring l"
    ):
        open_splits([tmp_path / "all"], tokenizer=letters, validation_fraction=0.3, min_length=50)
