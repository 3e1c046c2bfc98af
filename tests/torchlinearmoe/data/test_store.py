"""Token folders: what is written, that it is complete, and that processes may race."""

import multiprocessing
import os
import pickle

import numpy as np
import pytest

from torchlinearmoe.data import store as store_module
from torchlinearmoe.data.store import TokenStore, cached_store, document_key, is_store, write_store


def read(files):
    return (file.read_text() for file in files)


def test_documents_follow_their_markers(tmp_path, letters):
    store = write_store(tmp_path / "s", ["abc", "de"], letters)
    assert store.tokens.tolist() == [26, 0, 1, 2, 26, 3, 4]
    assert store.offsets.tolist() == [0, 4, 7]
    assert store.keys.tolist() == [document_key("abc"), document_key("de")]
    assert (store.num_documents, store.num_tokens, store.end_of_text, store.vocab_size) == (2, 7, 26, 27)
    assert isinstance(store.tokens, np.memmap) and store.tokens.dtype == np.uint16


def test_many_batches_are_one_folder(tmp_path, letters, monkeypatch):
    monkeypatch.setattr(store_module, "BATCH_CHARACTERS", 10)
    texts = ["abcdefg"[: 1 + i % 7] for i in range(100)]
    seen = []
    store = write_store(tmp_path / "s", iter(texts), letters, progress=lambda *done: seen.append(done))
    assert [store.tokens[a + 1 : b].tolist() for a, b in zip(store.offsets, store.offsets[1:])] == [
        letters.encode(text) for text in texts
    ]
    assert len(seen) > 10 and seen[-1] == (store.num_documents, store.num_tokens)


def test_large_vocabularies_take_32_bits(tmp_path, letters):
    letters.vocab_size, letters.end_of_text = 70_001, 70_000
    store = write_store(tmp_path / "s", ["ab"], letters)
    assert store.tokens.tolist() == [70_000, 0, 1] and store.tokens.dtype == np.uint32
    letters.vocab_size, letters.end_of_text = 1 << 16, (1 << 16) - 1
    store = write_store(tmp_path / "t", ["ab"], letters)
    assert store.tokens.tolist() == [(1 << 16) - 1, 0, 1] and store.tokens.dtype == np.uint16


def test_pickling_sends_the_path(tmp_path, letters):
    store = write_store(tmp_path / "s", ["a" * 100_000], letters)
    assert len(store.tokens) == 100_001
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    assert np.array_equal(pickle.loads(pickled).tokens, store.tokens)


def test_cache_is_used_until_something_changes(tmp_path, letters):
    file = tmp_path / "a.txt"
    file.write_text("abc")
    reads = []

    def counted(files):
        reads.append(files)
        return read(files)

    first = cached_store([file], counted, letters, tmp_path / "cache")
    again = cached_store([file], counted, letters, tmp_path / "cache")
    assert first.folder == again.folder and len(reads) == 1
    file.write_text("abd")
    os.utime(file, ns=(1, 1))
    changed = cached_store([file], counted, letters, tmp_path / "cache")
    assert changed.tokens.tolist() == [26, 0, 1, 3] and len(reads) == 2
    letters.fingerprint = "other"
    assert cached_store([file], counted, letters, tmp_path / "cache").folder != changed.folder


def test_a_failure_leaves_nothing_behind(tmp_path, letters):
    def broken():
        yield "abc"
        raise ValueError("line 2")

    with pytest.raises(ValueError, match="line 2"):
        write_store(tmp_path / "cache" / "s", broken(), letters)
    with pytest.raises(ValueError, match="hold no text"):
        write_store(tmp_path / "cache" / "s", [], letters)
    assert list((tmp_path / "cache").iterdir()) == []


def _race(barrier, queue, folder, letters):
    barrier.wait()
    queue.put(write_store(folder, ("abc" for _ in range(2000)), letters).num_tokens)


def test_processes_may_race(tmp_path, letters):
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(4), context.Queue()
    arguments = (barrier, queue, tmp_path / "cache" / "s", letters)
    processes = [context.Process(target=_race, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=30) for _ in processes] == [8000] * 4
    for process in processes:
        process.join()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["s"]


def test_other_folders_are_refused(tmp_path, letters):
    assert not is_store(tmp_path)
    (tmp_path / "store.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99, this version reads 1"):
        TokenStore(tmp_path)
    (tmp_path / "store.json").write_text("[")
    with pytest.raises(ValueError, match="not a token folder"):
        TokenStore(tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    with pytest.raises(ValueError, match="in use by something else"):
        write_store(tmp_path / "used", ["abc"], letters)
    with pytest.raises(ValueError, match="cannot write tokens to"):
        write_store(tmp_path / "used" / "file" / "s", ["abc"], letters)
