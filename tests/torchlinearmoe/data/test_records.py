"""Pieces of files: every document is in exactly one of them, whatever the ranges, the kind and the compression."""

import bz2
import gzip
import json
import sys
from pathlib import Path

import pytest

from torchlinearmoe.data import records
from torchlinearmoe.data.records import Bad, Part, Piece, read_records
from torchlinearmoe.data.sources import find_sources, read_documents
from torchlinearmoe.data.units import plan_units
from torchlinearmoe.errors import UserError

TEXTS = ["one", "zwei\r\nlines", "", "drei é\U0001f600 " * 9, "4\n\n"]


def zstd(data):
    compressor = pytest.importorskip("zstandard").ZstdCompressor()
    return compressor.compress(data[: len(data) // 2]) + compressor.compress(data[len(data) // 2 :])


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd}


def json_lines(texts=TEXTS):
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def in_ranges(path, edges):
    return [record for a, b in zip(edges, edges[1:]) for record in read_records(Piece(str(path), a, b))]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("end", ["", "tail"])
def test_ranges_share_out_the_documents_of_a_file(tmp_path, name, end):
    lines = json_lines() if name == "a.jsonl" else "<|endoftext|>".join(TEXTS).encode()
    content = lines + (b"" if not end else b'{"text": "tail"}' if name == "a.jsonl" else b"<|endoftext|>tail")
    path = tmp_path / name
    path.write_bytes(content)
    whole = [text for text in read_records(Piece(str(path))) if text]
    assert whole == [text for text in TEXTS if text] + [end] * bool(end)
    for cut in range(1, len(content)):
        assert [text for text in in_ranges(path, [0, cut, len(content)]) if text] == whole, cut
    assert [text for text in in_ranges(path, range(len(content) + 1)) if text] == whole


def test_ranges_know_their_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": 1}\n{"text": "b"}\nnone\n')
    for cut in range(1, path.stat().st_size):
        found = in_ranges(path, [0, cut, path.stat().st_size])
        assert [record.line for record in found if isinstance(record, Bad)] == [3, 5], cut
        assert [record for record in found if isinstance(record, str)] == ["a", "b"]
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\n<|endoftext|>b\n\n<|endoftext|>c\n\xff<|endoftext|>d")
    for cut in range(path.stat().st_size):
        bad = [record for record in in_ranges(path, [0, cut, path.stat().st_size]) if isinstance(record, Bad)]
        assert [str(record) for record in bad] == [f"{path}, line 5: not UTF-8: invalid start byte"], cut


@pytest.mark.parametrize("compression", COMPRESS)
def test_compressed_files_are_read_as_they_are_without(tmp_path, compression):
    compress = COMPRESS[compression]
    (tmp_path / f"a.jsonl{compression}").write_bytes(compress(json_lines()))
    (tmp_path / f"b.txt{compression}").write_bytes(compress(b"x<|endoftext|>y"))
    assert list(read_documents(find_sources([tmp_path]).files)) == [text for text in TEXTS if text.strip()] + ["x", "y"]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: data[:20] + b"????" + data[24:], lambda _: b"?"]
)
def test_compressed_files_that_are_damaged_are_named(tmp_path, compression, damage):
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(damage(COMPRESS[compression](json_lines(TEXTS * 50))))
    with pytest.raises(UserError, match=f"a.jsonl{compression}") as error:
        list(read_documents([path]))
    assert "\n" not in str(error.value)


def test_zstd_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(b"?")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(
        UserError, match=r"a.jsonl.zst: reading zstd needs zstandard: pip install torchlinearmoe\[data\]"
    ):
        list(read_documents([tmp_path / "a.jsonl.zst"]))


def test_parquet_in_row_groups_nested_and_compressed(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    rows = [{"a": {"b": None if i == 7 else f"text {i}"}} for i in range(10)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    found = [r for a, b in [(0, 1), (1, 3), (3, 4)] for r in read_records(Piece(str(path), a, b), "a.b")]
    assert found[:7] + found[8:] == [row["a"]["b"] for row in rows if row["a"]["b"]]
    assert str(found[7]) == f"{path}, row 7: the column 'a.b' holds no string there"
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress(path.read_bytes()))
    again = list(read_records(Piece(str(tmp_path / "b.parquet.gz")), "a.b"))
    assert [str(r).replace("b.parquet.gz", "a.parquet") for r in again] == [str(r) for r in found]
    with pytest.raises(UserError, match="no column 'a.c'; it has a"):
        list(read_records(Piece(str(path)), "a.c"))


def test_json_under_a_nested_key(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": {"b": "x"}}\n{"a.b": "y", "a": 3}\n{"a": {"c": "z"}}\n')
    *texts, bad = read_records(Piece(str(path)), "a.b")
    assert texts == ["x", "y"] and str(bad) == f'{path}, line 3: not an object with a string under "a.b"'


def test_long_documents_come_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PART_BYTES", 64)
    monkeypatch.setattr(records, "BLOCK", 16)
    text = "some words é and lines\nthat \n go on " * 20 + "é" * 300
    (tmp_path / "a.txt").write_text(f"short<|endoftext|>{text}<|endoftext|>last")
    first, *parts, last = read_records(Piece(str(tmp_path / "a.txt")))
    assert (first, last) == ("short", "last")
    assert len(parts) > 9 and [isinstance(part, Part) for part in parts] == [True] * (len(parts) - 1) + [False]
    texts = [str(part) for part in parts]
    assert "".join(texts) == text and max(len(part.encode()) for part in texts) <= 80
    assert list(read_documents([tmp_path / "a.txt"])) == ["short", text, "last"]


def test_units_have_every_byte_once_and_follow_from_the_files(tmp_path, monkeypatch):
    from torchlinearmoe.data import units

    monkeypatch.setattr(units, "LEAST_BYTES", 100)
    for number, size in enumerate([1000, 10, 20, 30, 0, 95]):
        (tmp_path / f"{number}.jsonl").write_bytes(b"\n" * size)
    (tmp_path / "x.jsonl.gz").write_bytes(b"\n" * 300)
    files = sorted(tmp_path.iterdir())
    found = plan_units(files)
    assert found == plan_units(files)
    for file in files:
        pieces = [piece for unit in found for piece in unit if piece.path == str(file)]
        assert sum(piece.size for piece in pieces) == file.stat().st_size
        assert [piece.stop for piece in pieces[:-1]] == [piece.start for piece in pieces[1:]]
    assert [len(unit) for unit in found] == [1] * 10 + [4, 1, 1]
    assert [Path(piece.path).name for piece in found[10]] == ["1.jsonl", "2.jsonl", "3.jsonl", "4.jsonl"]
