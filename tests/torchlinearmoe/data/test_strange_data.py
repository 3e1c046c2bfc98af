"""Data folders and files as accidents leave them: read, made again where they are a cache, or named in one line."""

import codecs
import json
import logging
import os
import shutil
import socket
import sys
import types

import numpy as np
import pytest

from torchlinearmoe.data.chat import Chat
from torchlinearmoe.data.chat_template import load_template
from torchlinearmoe.data.conversations import open_conversations
from torchlinearmoe.data.loader import build_validation_loader
from torchlinearmoe.data.sources import find_sources, read_documents
from torchlinearmoe.data.splits import open_splits
from torchlinearmoe.data.store import TokenStore, cached_store, write_store
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.errors import UserError


def open_messages(path):
    chat = Chat(load_template("plain"))
    cache = path.parent / "messages"
    return open_conversations([path], tokenizer=load_tokenizer(), chat=chat, validation_fraction=0, cache=cache)


LINE = b'{"text": "abc"}'


def test_a_byte_order_mark_and_other_line_ends_are_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + LINE + b"\r\n" + LINE + b"\r\n")
    (tmp_path / "b.txt").write_bytes(codecs.BOM_UTF8 + b"de")
    assert list(read_documents(find_sources([tmp_path]).files)) == ["abc", "abc", "de"]
    (tmp_path / "c.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"prompt": "a", "response": "b"}\r\n')
    assert len(open_messages(tmp_path / "c.jsonl").stores) == 1


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"text": ' + b"1" * 5000 + b"}"], ids=["deep", "long"])
def test_json_that_no_reader_takes_is_named(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE + b"\n" + content)
    with pytest.raises(UserError, match="a.jsonl, line 2: "):
        list(read_documents([path]))
    with pytest.raises(UserError, match="a.jsonl, line 1: "):
        path.write_bytes(content)
        open_messages(path)


def test_links_loops_and_pipes_are_named(tmp_path):
    def told(make):
        folder = tmp_path / f"case-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "a.jsonl").write_bytes(LINE)
        make(folder)
        with pytest.raises(UserError) as error:
            find_sources([folder])
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "b.jsonl' is a link to nothing; mend or remove it" in told(lambda f: (f / "b.jsonl").symlink_to("nowhere"))
    assert "b.txt' cannot be read: Too many levels" in told(lambda f: (f / "b.txt").symlink_to("b.txt"))
    assert "back' is a link to a folder around it; remove it" in told(lambda f: (f / "back").symlink_to("."))
    assert "b.txt' is no regular file" in told(lambda f: os.mkfifo(f / "b.txt"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.jsonl").write_bytes(LINE)
    (elsewhere / "twice").symlink_to(tmp_path / "case-0")
    assert len(find_sources([tmp_path / "elsewhere" / "twice" / "a.jsonl"]).files) == 1
    with pytest.raises(UserError, match="does not exist"):
        find_sources([tmp_path / "nowhere"])


def test_what_is_neither_file_nor_folder_is_not_called_one():
    with pytest.raises(UserError, match="'/dev/null' is no regular file and no folder"):
        find_sources(["/dev/null"])


def test_the_lock_of_a_run_is_no_file_of_an_unknown_kind(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock").write_text("")
    assert not find_sources([tmp_path], tmp_path / "run").unknown


def test_files_of_no_known_kind_are_counted(tmp_path):
    for name in ("a.jsonl", "b.csv", "c.csv", "d.gz", "NOTES", ".hidden.csv"):
        (tmp_path / name).write_bytes(LINE)
    assert dict(find_sources([tmp_path]).unknown) == {".csv": 2, ".gz": 1, "NOTES": 1}
    assert not find_sources().unknown, "what lies with the corpus that ships is meant"


class Damaged:
    """A parquet file whose second page is none."""

    schema_arrow = types.SimpleNamespace(names=["text"])

    def __init__(self, path):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def iter_batches(self, size, columns):
        column = types.SimpleNamespace(to_pylist=lambda: ["abc"])
        yield types.SimpleNamespace(column=lambda index: column)
        raise OSError("Unexpected end of stream:\nPage was smaller than expected")


def test_a_damaged_page_of_parquet_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", types.SimpleNamespace(ParquetFile=Damaged))
    documents = read_documents([tmp_path / "a.parquet"])
    assert next(documents) == "abc"
    with pytest.raises(UserError, match="a.parquet: damaged at row 1 or after it: Unexpected end of stream: Page was"):
        next(documents)


def damage(name, change):
    def do(folder):
        array = np.load(folder / name)
        np.save(folder / name, change(array))

    return do


def cut(folder):
    (folder / "tokens.npy").write_bytes((folder / "tokens.npy").read_bytes()[:-3])


def told_of(key, value):
    def do(folder):
        file = folder / "store.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))

    return do


DAMAGES = {
    "cut": cut,
    "no header": lambda folder: (folder / "keys.npy").write_bytes(b"\x93NUMPY\x01\0\x10\0{" + b" " * 99),
    "other type": damage("tokens.npy", lambda array: array.astype(np.float32)),
    "short": damage("keys.npy", lambda array: array[:-1]),
    "order": damage("offsets.npy", lambda array: np.array([0, 9, 4, 9])[: len(array)]),
    "count": told_of("documents", "3"),
    "special": told_of("end_of_text", 99),
    "deep": lambda folder: (folder / "store.json").write_text("[" * 100_000),
    "gone": lambda folder: (folder / "store.json").unlink(),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_tokens_are_named_and_made_again_where_they_are_a_cache(tmp_path, letters, caplog, kind):
    folder = write_store(tmp_path / "own", ["abc", "de"], letters).folder
    DAMAGES[kind](folder)
    if kind != "gone":
        with pytest.raises(UserError, match="own: not a token folder, or damaged: .*; make it again"):
            open_splits([folder], tokenizer=letters, validation_fraction=0)
    file = tmp_path / "a.txt"
    file.write_text("abc")

    def make():
        return cached_store([file], lambda files: (f.read_text() for f in files), letters, tmp_path / "cache")

    DAMAGES[kind](make().folder)
    with caplog.at_level(logging.WARNING):
        assert make().tokens.tolist() == [26, 0, 1, 2]
    assert "its text is read again" in caplog.text
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [make().folder.name]


def test_an_id_that_the_tokenizer_does_not_have_is_named(tmp_path, letters):
    folder = write_store(tmp_path / "own", ["abc", "de"], letters).folder
    damage("tokens.npy", lambda array: np.where(array == 3, 300, array).astype(array.dtype))(folder)
    samples = open_splits([folder], tokenizer=letters, validation_fraction=0).train.samples(7)
    with pytest.raises(UserError, match="own: damaged: 300 is none of its 27 ids; make it again"):
        samples[0]
    stream = open_splits([folder], tokenizer=letters, validation_fraction=0).train
    for workers in (0, 1):
        loader = build_validation_loader(stream, sequence_length=7, micro_batch_size=1, workers=workers)
        with pytest.raises(UserError) as caught:
            list(loader)
        assert str(caught.value) == f"{folder}: damaged: 300 is none of its 27 ids; make it again"


def test_what_killed_writers_left_is_removed(tmp_path, letters):
    host = socket.gethostname()
    names = (f"{host}-999999999", f"{host}-{os.getpid()}", "elsewhere-1")
    dead, living, others = (tmp_path / f".x-{name}-left" for name in names)
    for folder in (dead, living, others):
        folder.mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("abc")
    cache = tmp_path / "cache"
    for folder in (dead, living, others):
        (cache / folder.name).mkdir(parents=True)
    open_splits([tmp_path / "text"], tokenizer=letters, validation_fraction=0, cache=cache)
    assert {path.name for path in cache.glob(".*")} == {living.name, others.name}
    shutil.rmtree(cache)
    shutil.rmtree(tmp_path / "text")
    write_store(tmp_path / "own", ["abc"], letters)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living.name, others.name, "own"])
    assert isinstance(TokenStore(tmp_path / "own").num_tokens, int)
