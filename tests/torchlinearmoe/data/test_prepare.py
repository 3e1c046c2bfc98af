"""Files to token shards: the same tokens however the work was shared out, stopped and begun again."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from torchlinearmoe.data import shards, store, summary, units
from torchlinearmoe.data.fingerprint import fingerprint
from torchlinearmoe.data.prepare import Options, check, make_again, prepare
from torchlinearmoe.data.prepared import is_complete, open_tokens
from torchlinearmoe.data.sources import find_sources, read_documents
from torchlinearmoe.data.splits import open_splits
from torchlinearmoe.data.store import document_key, write_store
from torchlinearmoe.data.summary import count_duplicates
from torchlinearmoe.errors import UserError

DRAWN = random.Random(0)
TEXTS = ["".join(DRAWN.choices("abcdefghij", k=DRAWN.randint(1, 40))) for _ in range(300)] + ["abc"] * 5


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Many units and shards of little text."""
    monkeypatch.setattr(units, "LEAST_BYTES", 1500)
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 200)


@pytest.fixture
def files(tmp_path):
    """The texts in files of every kind."""
    folder = tmp_path / "text"
    folder.mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (folder / "a.jsonl").write_text("".join(lines[:150]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[150:220]).encode()))
    (folder / "c.txt").write_text("<|endoftext|>".join(TEXTS[220:280]))
    for number, text in enumerate(TEXTS[280:]):
        (folder / f"d{number:02}.txt").write_text(text)
    return list(find_sources([folder]).files)


def content(folder):
    """All tokens, lengths and keys of a folder."""
    stores = open_tokens(folder)
    arrays = [[s.tokens for s in stores], [np.diff(s.offsets) for s in stores], [s.keys for s in stores]]
    return [np.concatenate(some).tolist() for some in arrays]


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.parametrize("shard_tokens", [1, 500, 1 << 27])
def test_all_shards_together_are_one_token_folder(tmp_path, files, letters, begun, shard_tokens):
    for name, tokenizer in (("plain", letters), ("begun", begun)):
        told = []
        found = prepare(
            files,
            tokenizer,
            tmp_path / name,
            Options(shard_tokens=shard_tokens),
            tell=lambda *now, told=told: told.append(now),
        )
        whole = write_store(tmp_path / f"{name}-whole", TEXTS, tokenizer)
        assert content(tmp_path / name) == content(whole.folder)
        size = sum(file.stat().st_size for file in files)
        assert told[0] == (0, size) and told[-1] == (size, size) and told == sorted(told)
        lengths = np.diff(whole.offsets)
        assert found.documents == len(TEXTS) and found.tokens == whole.num_tokens
        assert found.bytes == sum(map(len, TEXTS)) and found.longest == lengths.max()
        assert found.lengths == [int(((lengths >= 2**i) & (lengths < 2 ** (i + 1))).sum()) for i in range(6)]
        assert found.duplicates == len(TEXTS) - len(set(TEXTS))
        count = len(open_tokens(tmp_path / name))
        assert count > 30 if shard_tokens == 1 else count > 4


def test_training_reads_the_same_from_shards_as_from_the_files(tmp_path, files, letters):
    prepare(files, letters, tmp_path / "out", Options(shard_tokens=300))
    whole = write_store(tmp_path / "whole", TEXTS, letters).folder
    for fraction, split in ((0, "documents"), (0.3, "documents"), (0.3, "tokens")):
        options = {"tokenizer": letters, "validation_fraction": fraction, "split": split, "cache": tmp_path / "cache"}
        found = [open_splits(paths, **options) for paths in ([tmp_path / "out"], [whole], files)]
        for splits in found[:2]:
            assert fingerprint(splits.stores) == fingerprint(found[2].stores)
            for here, there in ((splits.train, found[2].train), (splits.validation, found[2].validation)):
                assert len(here) == len(there) and here.num_documents == there.num_documents
                assert here.read(0, len(here)).tolist() == there.read(0, len(there)).tolist()
                for start in range(0, len(here) - 7, 97):
                    assert here.read(start, start + 7).tolist() == there.read(start, start + 7).tolist()


def test_a_start_goes_on_where_another_one_stopped(tmp_path, files, letters, monkeypatch):
    options = Options(shard_tokens=300)
    prepare(files, letters, tmp_path / "whole", options)
    wanted = files_of(tmp_path / "whole")
    write, calls = shards.write_arrays, 0

    def stops(aside, batches, tokenizer):
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            next(iter(batches), None)
            raise KeyboardInterrupt
        return write(aside, batches, tokenizer)

    monkeypatch.setattr(shards, "write_arrays", stops)
    starts = 0
    while not is_complete(tmp_path / "out"):
        starts += 1
        try:
            prepare(files, letters, tmp_path / "out", options)
        except KeyboardInterrupt:
            with pytest.raises(UserError, match="not all there yet; start prepare again"):
                open_splits([tmp_path / "out"], tokenizer=letters, validation_fraction=0)
    assert starts > 5 and calls < starts + len(list((tmp_path / "out" / "shards").iterdir())) + 1
    assert files_of(tmp_path / "out") == wanted
    assert prepare(files, letters, tmp_path / "out", options).documents == len(TEXTS)
    assert calls < starts + len(wanted), "nothing is left to do"


def test_what_a_killed_start_left_is_no_other_s_work(tmp_path, files, letters):
    prepare(files, letters, tmp_path / "whole")
    (tmp_path / "out" / ".keys-abc").mkdir(parents=True)
    for name in (".plan.json.7", ".prepared.json.7", ".bad_lines.jsonl.7", ".keys-abc/0"):
        (tmp_path / "out" / name).write_text("{")
    prepare(files, letters, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not list((tmp_path / "out").glob(".[!l]*"))


def test_damaged_shards_are_found_and_made_again(tmp_path, files, letters):
    options = Options(shard_tokens=300)
    prepare(files, letters, tmp_path / "out", options)
    assert check(tmp_path / "out") == []
    wanted, folders = files_of(tmp_path / "out"), [s.folder for s in open_tokens(tmp_path / "out")]
    damaged = [folders[0], folders[5], folders[-1]]
    for folder, name in zip(damaged, ("tokens.npy", "keys.npy", "offsets.npy")):
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)
    assert check(tmp_path / "out") == damaged
    make_again(tmp_path / "out", damaged)
    prepare(files, letters, tmp_path / "out", options)
    assert files_of(tmp_path / "out") == wanted


def test_bad_lines_are_named_or_skipped_with_a_report(tmp_path, letters):
    lines = [json.dumps({"text": text}) for text in TEXTS]
    lines[40], lines[200], lines[210] = "{", '{"body": 1}', '{"text": "  "}'
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match="a.jsonl, line 41: not JSON"):
        prepare([path], letters, tmp_path / "out")
    with pytest.raises(UserError, match="out: was begun with other bad_lines; give the same ones, or choose another"):
        prepare([path], letters, tmp_path / "out", Options(bad_lines="skip"))
    found = prepare([path], letters, tmp_path / "skips", Options(bad_lines="skip", shard_tokens=300))
    assert (found.documents, found.bad_lines, found.blank) == (len(TEXTS) - 3, 2, 1)
    report = [json.loads(line) for line in (tmp_path / "skips" / "bad_lines.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["line"]) for entry in report] == [(str(path), 41), (str(path), 201)]
    assert report[1]["reason"] == 'not an object with a string under "text"'
    assert content(tmp_path / "skips") == content(write_store(tmp_path / "w", _without(40, 200, 210), letters).folder)


def _without(*places):
    return [text for place, text in enumerate(TEXTS) if place not in places]


def test_folders_that_are_not_of_these_files_are_refused(tmp_path, files, letters, begun):
    prepare(files, letters, tmp_path / "out")
    with pytest.raises(UserError, match="begun with other files; give"):
        prepare(files[1:], letters, tmp_path / "out")
    with pytest.raises(UserError, match="begun with other tokenizer and text_key; give"):
        prepare(files, begun, tmp_path / "out", Options("body"))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="used: holds something else; choose an empty or new folder"):
        prepare(files, letters, tmp_path / "used")
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(UserError, match="the files hold no text"):
        prepare([tmp_path / "blank.txt"], letters, tmp_path / "blank")
    with pytest.raises(UserError, match="cannot write tokens to '.*thesis.tex/x': .*Not a directory; make room there"):
        prepare(files, letters, tmp_path / "used" / "thesis.tex" / "x")


def test_long_documents_stay_whole(tmp_path, letters, monkeypatch):
    from torchlinearmoe.data import records

    monkeypatch.setattr(records, "PART_BYTES", 64)
    monkeypatch.setattr(records, "BLOCK", 16)
    texts = ["abc", "defghi" * 100, "jkl", "mno" * 50]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts))
    found = prepare([tmp_path / "a.txt"], letters, tmp_path / "out", Options(shard_tokens=1))
    assert content(tmp_path / "out") == content(write_store(tmp_path / "w", texts, letters).folder)
    assert found.documents == 4 and open_tokens(tmp_path / "out")[0].keys[0] == document_key("abc")


def test_duplicates_are_counted_in_little_memory(tmp_path, monkeypatch):
    keys = np.random.default_rng(0).integers(0, 1 << 64, 5000, dtype=np.uint64)
    keys = np.concatenate([keys, keys[:700], keys[:20], np.array([0, (1 << 64) - 1] * 2, dtype=np.uint64)])
    assert count_duplicates([keys[:100], keys[100:]], len(keys), tmp_path) == 722
    monkeypatch.setattr(summary, "AT_ONCE", 900)
    assert count_duplicates([keys[:100], keys[100:]], len(keys), tmp_path) == 722
    assert list(tmp_path.iterdir()) == []


def test_a_cache_keeps_what_was_finished_and_mends_what_is_damaged(tmp_path, files, letters, monkeypatch, caplog):
    def opened():
        return open_splits(files, tokenizer=letters, validation_fraction=0, cache=tmp_path / "cache")

    write, calls = shards.write_arrays, []
    monkeypatch.setattr(shards, "write_arrays", lambda *call: calls.append(1) or write(*call))
    wanted = opened().train.read(0, 3000).tolist()
    count = len(calls)
    assert opened().train.read(0, 3000).tolist() == wanted and len(calls) == count > 4
    (folder,) = (tmp_path / "cache").iterdir()
    damaged = opened().stores[2].folder
    (damaged / "offsets.npy").write_bytes(b"?")
    assert opened().train.read(0, 3000).tolist() == wanted and len(calls) == count + 1
    assert "its text is read again" in caplog.text
    (folder / "prepared.json").write_text("{")
    assert opened().train.read(0, 3000).tolist() == wanted
    (folder / "prepared.json").unlink()
    os.utime(files[0], ns=(1, 1))
    assert opened().train.read(0, 3000).tolist() == wanted
    assert folder not in (tmp_path / "cache").iterdir(), "what was begun from files as they were is of no use"


def test_few_shards_are_open_at_once(tmp_path, files, letters, monkeypatch):
    monkeypatch.setattr(store, "MOST_OPEN", 3)
    store._opened.clear()
    prepare(files, letters, tmp_path / "out", Options(shard_tokens=1))
    splits = open_splits([tmp_path / "out"], tokenizer=letters, validation_fraction=0.3)
    whole = splits.train.read(0, len(splits.train)).tolist()
    for start in (len(whole) - 50, 0, 1000, 20):
        assert splits.train.read(start, start + 40).tolist() == whole[start : start + 40]
    assert sum("tokens" in s.__dict__ for s in splits.stores) <= 3 == len(store._opened)


COMMAND = [sys.executable, "-m", "torchlinearmoe.prepare"]


def run(*arguments, code=0):
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture
def corpus_files(tmp_path):
    """About 24 MB of the corpus that ships, in three units."""
    lines = find_sources().files[0].read_text()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text(lines * 18)
    (tmp_path / "text" / "b.jsonl.gz").write_bytes(gzip.compress((lines * 7).encode(), 1))
    return tmp_path / "text"


@pytest.mark.slow
def test_workers_killed_and_begun_again_write_what_one_process_does(tmp_path, corpus_files):
    summaries = [json.loads(run(corpus_files, "--output", tmp_path / "one", "--workers", 1, "--json"))]
    process = subprocess.Popen([*COMMAND, str(corpus_files), "--output", str(tmp_path / "two"), "--workers", "2"])
    while not list(tmp_path.glob("two/shards/0*/shard.json")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not is_complete(tmp_path / "two")
    summaries.append(json.loads(run(corpus_files, "--output", tmp_path / "two", "--workers", 2, "--json")))
    assert summaries[0] == summaries[1] and summaries[0]["duplicates"] == 24 * 260
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    assert one == two and len(one) > 9


def test_the_command_says_what_it_did_and_what_is_wrong(tmp_path):
    lines = [json.dumps({"content": {"text": f"document {i}"}}) for i in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{"]))
    told = ["--output", tmp_path / "out", "--text-key", "content.text"]
    error = run(tmp_path / "*.jsonl", *told, code=1)
    assert error.startswith("error: ") and "line 51: not JSON" in error and "--bad-lines=skip" in error
    assert error.count("\n") == 1
    out = run(tmp_path / "*.jsonl", "--output", tmp_path / "out2", *told[2:], "--bad-lines=skip", "--workers", 1)
    assert "documents                               50" in out and "bad_lines.jsonl" in out
    assert "data.paths=" in out
    assert "INPUT: '" in run(tmp_path / "none", *told, code=1)
    assert "holds tokens already" in run(tmp_path / "out2", *told, code=1)


def test_documents_in_order_are_those_of_the_files(files):
    assert list(read_documents(files)) == TEXTS


PEAK = """
import resource, sys
from pathlib import Path
from torchlinearmoe.data.prepare import prepare
from torchlinearmoe.data.tokenizer import load_tokenizer
prepare([Path(sys.argv[1])], load_tokenizer(), Path(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(tmp_path):
    """Neither with documents nor with the length of one."""
    lines = find_sources().files[0].read_text()
    peaks = []
    for name, text in (("a.jsonl", lines * 6), ("b.jsonl", lines * 36), ("c.txt", lines.replace("\\n", "\n") * 48)):
        (tmp_path / name).write_text(text)
        arguments = [sys.executable, "-c", PEAK, tmp_path / name, tmp_path / f"out-{name}"]
        peaks.append(int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] < peaks[0] + 60_000, peaks
    assert peaks[2] < peaks[0] + 150_000, peaks
