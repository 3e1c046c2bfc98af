"""What `prepare` and the data of `train` refuse, and each line that says so."""

# ruff: noqa: E501 (lines as users see them)

import gzip
import json
import re
import sys

import pytest

from torchlinearmoe.data.open import open_data
from torchlinearmoe.data.store import write_store
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.errors import UserError
from torchlinearmoe.prepare import main
from torchlinearmoe.recipe import resolve

TOKENIZER = load_tokenizer()
GOOD = '{"text": "abc"}\n'
KINDS = ".txt, .jsonl, .json, .parquet"


def _files(folder):
    (folder / "good.jsonl").write_text(GOOD)
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(GOOD.encode() * 99)[:-9])
    (folder / "json.jsonl").write_text(GOOD + "{")
    (folder / "key.jsonl").write_text(GOOD + '{"body": "abc"}')
    (folder / "bytes.jsonl").write_bytes(GOOD.encode() + b'{"text": "\xff"}')
    (folder / "bytes.txt").write_bytes(b"abc\n\xff")
    (folder / "not.parquet").write_bytes(b"abc")
    (folder / "blank.txt").write_text(" ")
    (folder / "x.bin").write_bytes(b"")
    (folder / "x.idx").write_bytes(b"MMIDIDX")
    (folder / "thesis.tex").write_text("")
    (folder / "messages.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    (folder / "empty").mkdir()
    (folder / "link.txt").symlink_to("nowhere")
    (folder / "begun" / "shards").mkdir(parents=True)
    (folder / "begun" / "plan.json").write_text("{}")
    write_store(folder / "tokens", ["abc"], TOKENIZER)


REFUSED_BY_PREPARE = {
    "none.jsonl": "INPUT: '{}/none.jsonl' does not exist; name a file, a folder or a pattern of files that are there",
    "none*.txt": "INPUT: '{}/none*.txt' does not exist; name a file, a folder or a pattern of files that are there",
    "thesis.tex": "INPUT: '{}/thesis.tex' is of no known kind; legal: " + KINDS + ", each also with .gz, .zst, .bz2, a "
    "pair of .bin and .idx, or a folder",
    "empty": "INPUT: the folder '{}/empty' holds no " + KINDS + " file",
    "link.txt": "INPUT: '{}/link.txt' is a link to nothing; mend or remove it",
    "tokens": "INPUT: '{}/tokens' holds tokens already; name it in data.paths, or take it away",
    "x.idx": "INPUT: '{}/x.idx' holds tokens already; name it in data.paths, or take it away",
    "json.jsonl": "{}/json.jsonl, line 2: not JSON: Expecting property name enclosed in double quotes at column 2; mend "
    "it, or pass over such lines with --bad-lines=skip",
    "key.jsonl": '{}/key.jsonl, line 2: not an object with a string under "text"; mend it, or pass over such lines with '
    "--bad-lines=skip",
    "bytes.jsonl": "{}/bytes.jsonl, line 2: not UTF-8: invalid start byte; mend it, or pass over such lines with "
    "--bad-lines=skip",
    "bytes.txt": "{}/bytes.txt, line 2: not UTF-8: invalid start byte; mend it, or pass over such lines with "
    "--bad-lines=skip",
    "cut.jsonl.gz": "{}/cut.jsonl.gz: damaged or cut off: Compressed file ended before the end-of-stream marker was "
    "reached; get the file again",
    "blank.txt": "the files hold no text; name files that do, or where they keep it (--text-key)",
    "good.jsonl --shard-tokens=0": "--shard-tokens 0: must be at least 1",
    "good.jsonl --workers=-1": "--workers -1: must be at least 1",
    "good.jsonl --tokenizer=none": "data.tokenizer = 'none': no such file; give a tiktoken file or a Hugging Face "
    "tokenizer.json",
    "good.jsonl --begin-of-text": f"data.begin_of_text = true: {TOKENIZER.path} names no token that begins a text; leave "
    "it out",
    "good.jsonl --output={}/empty/../good.jsonl/x": "cannot write tokens to '{}/empty/../good.jsonl/x': "
    "{}/empty/../good.jsonl/x/shards: Not a directory; "
    "make room there, or choose another --output",
    "good.jsonl --output={}/tokens": "{}/tokens: holds something else; choose an empty or new folder",
    "good.jsonl --output={}/begun": "{}/begun: was begun with other format and files and tokenizer and text_key and "
    "bad_lines and shard_tokens; give the same ones, or choose another folder",
    "good.jsonl --chat-template=tools": "--chat-template: only messages are written so; add --format=messages",
    "good.jsonl --trained-roles=user": "--trained-roles: only messages are written so; add --format=messages",
    "good.jsonl --format=messages --text-key=a": "--text-key a: messages have no text; leave it out",
    "bytes.txt --format=messages": "INPUT: '{}/bytes.txt': data.format = 'messages' needs JSONL files or parquet",
    "good.jsonl --format=messages --chat-template=tool": "data.chat_template = 'tool': no such file or template; did you "
    "mean 'tools'? legal: chatml, plain, tokenizer, tools",
    "good.jsonl --format=messages --chat-template=tokenizer": "data.chat_template = 'tokenizer': neither a "
    f"chat_template.jinja nor a chat_template in a tokenizer_config.json lies with {TOKENIZER.path}; legal: chatml, plain, "
    "tools",
    "messages.jsonl --format=messages": "{}/messages.jsonl, line 1: no message of the assistant: nothing to train on; "
    "mend it, or pass over such lines with --bad-lines=skip",
}


@pytest.mark.parametrize("arguments", REFUSED_BY_PREPARE)
def test_prepare_refuses_in_one_line(arguments, tmp_path, capsys):
    _files(tmp_path)
    name, *options = arguments.format(tmp_path).split()
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / name), "--output", str(tmp_path / "out"), "--workers=1", *options])
    wanted = REFUSED_BY_PREPARE[arguments].replace("{}", str(tmp_path))
    assert ended.value.code == 1 and capsys.readouterr().err.strip() == f"error: {wanted}"


REFUSED_BY_TRAIN = {
    '{"paths": ["{}/none"]}': "data.paths: '{}/none' does not exist; name a file, a folder or a pattern of files that are "
    "there",
    '{"paths": ["{}/json.jsonl"]}': "data.paths: {}/json.jsonl, line 2: not JSON: Expecting property name enclosed in "
    "double quotes at column 2",
    '{"paths": ["{}/begun"]}': "{}/begun: its shards are not all there yet; start prepare again with the same arguments",
    '{"paths": ["{}/x.idx"]}': "{}/x.idx: not a Megatron index, or damaged: unpack requires a buffer of 34 bytes; make it "
    "again",
    '{"sources": [{"path": "{}/good.jsonl"}, {"path": "{}/blank.txt"}], "validation_fraction": 0}': "data.paths: the files "
    "hold no text; name files that do, or where they keep it (--text-key)",
    '{"paths": ["{}/good.jsonl"], "validation_fraction": 0.5}': "data.validation_fraction = 0.5 leaves no document",
    '{"paths": ["{}/good.jsonl"], "validation_paths": ["a={}/good.jsonl", "a={}/key.jsonl"], "validation_fraction": 0}': (
        "data.validation_paths: two are called 'a'; name them apart: 'NAME={}/key.jsonl'"
    ),
    '{"paths": ["{}/tokens"], "format": "messages"}': "data.paths: '{}/tokens' holds tokens of text, not of messages; set "
    "data.format = 'text'",
    '{"paths": ["{}/a.txt"], "sources": [{"path": "x"}]}': "data.paths and data.sources exclude each other; give one",
    '{"sources": [{"path": "x", "weight": 0}]}': "data.sources: weight = 0.0 of 'x': must be positive",
    '{"sources": [{"path": "x", "split": "validation"}]}': "data.sources: every split = 'validation'; leave one to train on",
}


@pytest.mark.parametrize("table", REFUSED_BY_TRAIN)
def test_the_data_of_a_run_are_refused_in_one_line(table, tmp_path):
    _files(tmp_path)
    wanted = REFUSED_BY_TRAIN[table].replace("{}", str(tmp_path))
    with pytest.raises(UserError) as caught:
        data = json.loads(table.replace("{}", str(tmp_path)))
        open_data(resolve({"data": data, "training": {"steps": 1}}).data, TOKENIZER, tmp_path / "cache")
    assert str(caught.value).startswith(wanted) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "package", "what"), [("a.jsonl.zst", "zstandard", "zstd"), ("a.parquet", "pyarrow", "parquet")]
)
def test_a_package_that_is_missing_is_named(name, package, what, tmp_path, monkeypatch, capsys):
    (tmp_path / name).write_bytes(b"abc")
    for module in (package, "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit):
        main([str(tmp_path / name), "--output", str(tmp_path / "out"), "--workers=1"])
    line = capsys.readouterr().err.strip()
    assert line == f"error: {tmp_path / name}: reading {what} needs {package}: pip install torchlinearmoe[data]"


def test_a_damaged_parquet_file_is_named(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    _files(tmp_path)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "not.parquet"), "--output", str(tmp_path / "out"), "--workers=1"])
    line = capsys.readouterr().err.strip()
    assert re.match(rf"error: {tmp_path}/not.parquet: not a parquet file: .+", line) and "\n" not in line
