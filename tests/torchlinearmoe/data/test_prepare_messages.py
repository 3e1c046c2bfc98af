"""Messages to token shards: the samples that training reads of the files themselves."""

import gzip
import json
import random
import re

import numpy as np
import pytest

from torchlinearmoe.data import shards, units
from torchlinearmoe.data.chat import Chat
from torchlinearmoe.data.chat_template import load_template
from torchlinearmoe.data.conversations import open_conversations
from torchlinearmoe.data.fingerprint import fingerprint
from torchlinearmoe.data.open import open_data
from torchlinearmoe.data.prepare import Options, check, prepare
from torchlinearmoe.data.prepared import open_tokens
from torchlinearmoe.data.sources import find_sources
from torchlinearmoe.data.splits import open_splits
from torchlinearmoe.data.store import write_encoded, write_store
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.errors import UserError
from torchlinearmoe.prepare import main
from torchlinearmoe.recipe import resolve

DRAWN = random.Random(1)
TOKENIZER = load_tokenizer()


def words():
    return " ".join(DRAWN.choices(["alpha", "beta", "gamma"], k=DRAWN.randint(1, 9)))


def entry(number):
    turns = [{"role": "user", "content": f"{number} {words()}"}, {"role": "assistant", "content": words()}]
    if number % 3 == 0:
        call = {"function": {"name": "f", "arguments": {"x": number}}}
        turns += [{"role": "assistant", "content": words(), "tool_calls": [call]}, {"role": "tool", "content": words()}]
        turns += [{"role": "assistant", "content": words()}]
    return {"messages": turns}


ENTRIES = [entry(number) for number in range(150)] + [{"prompt": "a", "response": "b"}] * 3


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Many units and shards of little text."""
    monkeypatch.setattr(units, "LEAST_BYTES", 4000)
    monkeypatch.setattr(shards, "BATCH_TOKENS", 300)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "messages"
    folder.mkdir()
    lines = [json.dumps(entry) + "\n" for entry in ENTRIES]
    (folder / "a.jsonl").write_text("".join(lines[:100]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[100:]).encode()))
    return folder


def opened(path, chat, cache=None, fraction=0.2):
    return open_conversations([path], tokenizer=TOKENIZER, chat=chat, validation_fraction=fraction, cache=cache)


def samples(split, length=256):
    packed = split.samples(length)
    return [(s.tokens.tolist(), s.labels.tolist(), list(s.starts)) for s in map(packed.__getitem__, range(len(packed)))]


@pytest.mark.parametrize("roles", [("assistant",), ("tool", "user")])
def test_samples_are_those_of_the_files_and_of_one_store(tmp_path, folder, roles):
    chat, files = Chat(load_template("tools"), roles), find_sources([folder]).files
    found = prepare(files, TOKENIZER, tmp_path / "out", Options(chat=chat, shard_tokens=500))
    documents = [chat.encode(entry, TOKENIZER) for entry in ENTRIES] if "tool" not in roles else None
    assert len(open_tokens(tmp_path / "out")) > 5 and check(tmp_path / "out") == []
    prepared, direct = opened(tmp_path / "out", chat), opened(folder, chat, tmp_path / "cache")
    assert fingerprint(prepared.stores) == fingerprint(direct.stores)
    for here, there in ((prepared.train, direct.train), (prepared.validation, direct.validation)):
        assert samples(here) == samples(there) and len(here.samples(256)) > 3
    masks = np.concatenate([store.trained for store in prepared.stores])
    assert found.trained == masks.sum() and found.documents == 153 and found.duplicates == 2
    if documents is not None:
        one = write_encoded(tmp_path / "one", [documents], TOKENIZER)
        assert masks.tolist() == one.trained.tolist()
        assert samples(opened(one.folder, chat).train) == samples(prepared.train)


def test_an_interrupted_start_goes_on(tmp_path, folder, monkeypatch):
    chat, files = Chat(load_template("tools")), find_sources([folder]).files
    prepare(files, TOKENIZER, tmp_path / "whole", Options(chat=chat))
    write, calls = shards.write_arrays, []

    def stops(*given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(*given)

    monkeypatch.setattr(shards, "write_arrays", stops)
    with pytest.raises(KeyboardInterrupt):
        prepare(files, TOKENIZER, tmp_path / "out", Options(chat=chat))
    prepare(files, TOKENIZER, tmp_path / "out", Options(chat=chat))
    for name in ("plan.json", "prepared.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_processes_write_what_one_does(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(units, "LEAST_BYTES", 10_000)
    chat, files = Chat(load_template("tools"), ("user", "tool")), find_sources([folder]).files
    prepare(files, TOKENIZER, tmp_path / "one", Options(chat=chat))
    monkeypatch.setattr("torchlinearmoe.data.prepare.WORTH_A_WORKER", 1)
    prepare(files, TOKENIZER, tmp_path / "two", Options(chat=chat), workers=2)
    names = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.npy"))
    assert len(names) > 7
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_parquet_of_messages_is_the_same(tmp_path, folder):
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    entries = [entry for entry in ENTRIES if "messages" in entry]
    chat = Chat(load_template("tools"))
    parquet.write_table(pyarrow.Table.from_pylist(entries), tmp_path / "a.parquet", row_group_size=40)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    found = [opened(tmp_path / name, chat, tmp_path / "cache", 0) for name in ("a.parquet", "a.jsonl")]
    assert samples(found[0].train) == samples(found[1].train)
    keys = [np.concatenate([store.keys for store in splits.stores]).tolist() for splits in found]
    assert keys[0] == keys[1]


def test_what_does_not_fit_is_named(tmp_path, folder, capsys):
    chat = Chat(load_template("tools"))
    out = tmp_path / "out"
    prepare(find_sources([folder]).files, TOKENIZER, out, Options(chat=chat))
    with pytest.raises(
        UserError, match="data.chat_template: the messages in '.*out' were prepared by another template"
    ):
        opened(out, Chat(load_template("chatml")))
    with pytest.raises(UserError, match=r"data.trained_roles = \['user'\]: of the messages in '.*out' those of \['ass"):
        opened(out, Chat(load_template("tools"), ("user",)))
    with pytest.raises(UserError, match="data.paths: '.*out' holds messages; set data.format = 'messages'"):
        open_splits([out], tokenizer=TOKENIZER, validation_fraction=0)
    text = write_store(tmp_path / "text", ["abc"], TOKENIZER).folder
    with pytest.raises(UserError, match="data.paths: '.*text' holds tokens of text, not of messages; set data.format"):
        opened(text, chat)
    with pytest.raises(UserError, match="out: was begun with other messages; give the same ones"):
        prepare(find_sources([folder]).files, TOKENIZER, out, Options(chat=Chat(load_template("tools"), ("user",))))
    with pytest.raises(UserError, match="out: was begun with other messages; give the same ones"):
        prepare(find_sources([folder]).files, TOKENIZER, out)
    (tmp_path / "a.txt").write_text("abc")
    for arguments, wanted in (
        ([folder, "--chat-template=tools"], "--chat-template: only messages are written so; add --format=messages"),
        ([folder, "--format=messages", "--text-key=body"], "--text-key body: messages have no text; leave it out"),
        ([tmp_path / "a.txt", "--format=messages"], "INPUT: '.*a.txt': data.format = 'messages' needs JSONL"),
        ([folder, "--format=messages"], "a.jsonl, line 1: the chat template has no form for tools"),
    ):
        with pytest.raises(SystemExit):
            main([*map(str, arguments), "--output", str(tmp_path / "other"), "--workers=1"])
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert re.search(wanted, line), line


def test_the_command_prepares_what_train_reads(tmp_path, folder, capsys):
    with (folder / "b.jsonl.gz").open("ab") as file:
        file.write(gzip.compress(b'{"messages": [{"role": "tool", "content": "a"}]}\n'))
    told = ["--format=messages", "--chat-template=tools", "--trained-roles=assistant,user", "--bad-lines=skip"]
    assert main([str(folder), "--output", str(tmp_path / "out"), *told, "--workers=2"]) == 0
    shown = capsys.readouterr().out
    assert "of them trained" in shown and "bad_lines.jsonl" in shown
    assert '--data.format=messages --data.chat_template=tools --data.trained_roles=\'["assistant", "user"]\'' in shown
    (bad,) = map(json.loads, (tmp_path / "out" / "bad_lines.jsonl").read_text().splitlines())
    assert (bad["line"], bad["reason"]) == (54, "no message of the assistant or user: nothing to train on")
    data = {"format": "messages", "chat_template": "tools", "trained_roles": ["assistant", "user"]}
    data |= {"paths": [str(tmp_path / "out")], "validation_fraction": 0.1}
    splits = open_data(resolve({"data": data, "training": {"steps": 1}}).data, TOKENIZER, tmp_path / "cache")
    assert splits.train.num_documents + splits.validation.num_documents == 153
    with pytest.raises(UserError, match=r"data.trained_roles = \[\]: name each role once that is trained"):
        resolve({"data": data | {"trained_roles": []}, "training": {"steps": 1}})
