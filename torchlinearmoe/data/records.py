"""Pieces of files to records: a text, a part of a long one, or a line that is none.

    .txt                 one document, or several with <|endoftext|> between them
    .jsonl, .json        an object a line, its text under a key, which may be nested: "a.b"
    .parquet             the same with a column

or, where they hold messages, what `parse` makes of each line or row as a whole.

A piece is a range of a file, so that several processes share a large one. A range has the documents that begin in it:

    bytes       0 . . . . . . . |10 . . . . . . |20 . . . .
    lines       aaaaaaa bbbbbbbbbbbbbbb ccc ddddddddddd
    pieces      a b             | c d           | -

Of compressed files there is one piece, and ranges of parquet count row groups. A text document beyond PART_BYTES comes
in parts, so that memory stays bounded; they are cut at ends of lines, where byte-pair encodings cut as well.
"""

from __future__ import annotations

import codecs
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from torchlinearmoe.data.formats import compression_of, kind_of, opened, optional
from torchlinearmoe.data.store import Encoded
from torchlinearmoe.data.tokenizer import END_OF_TEXT
from torchlinearmoe.errors import UserError

SEPARATOR = END_OF_TEXT.encode()
PART_BYTES = 1 << 22
"""Of a text document that comes whole."""
BLOCK = 1 << 20
"""Bytes read at once."""
ROWS = 256
"""Of parquet, read at once."""


class Piece(NamedTuple):
    """A range of a file."""

    path: str
    start: int = 0
    """Its first byte; of parquet its first row group."""
    stop: int | None = None
    """The byte or row group after it; None for the end of the file."""
    size: int = 0
    """Bytes on disk."""


class Part(str):
    """The text of a document that goes on in the next record."""

    __slots__ = ()


class Bad(NamedTuple):
    """A line or row that holds no text."""

    path: Path
    line: int
    reason: str
    place: str = "line"
    more: bool = False
    """Whether it is a part of a document that goes on after it."""

    def __str__(self) -> str:
        return f"{self.path}, {self.place} {self.line}: {self.reason}"


class BadLine(UserError):
    """What is in a file cannot be read."""


Record = str | Part | Bad | Encoded

Parse = Callable[[Any], Encoded]
"""A line or row to a document. Raises ValueError that tells why it is none."""


class Reading:
    """How far the reading of a piece has come."""

    read: Callable[[], int] = staticmethod(lambda: 0)
    """Bytes on disk."""


def read_records(
    piece: Piece, key: str = "text", reading: Reading | None = None, parse: Parse | None = None
) -> Iterator[Record]:
    """The records of a piece in their order. `key`: where JSON and parquet have the text; `a.b` for a nested one.

    With `parse` there is no key: the records are what it makes of whole lines and rows.
    """
    reading, kind = reading or Reading(), kind_of(Path(piece.path))
    if kind == ".txt":
        records = _read_text(piece, reading)
    else:
        records = (_read_parquet if kind == ".parquet" else _read_json_lines)(piece, key, reading, parse)
    for record in records:
        yield record if not isinstance(record, str) or record.isascii() else _without_surrogates(record)


def _without_surrogates(text: str) -> str:
    """JSON can spell half a character; it becomes U+FFFD, so that every text has a UTF-8 form."""
    return type(text)(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


@contextmanager
def _positioned(piece: Piece, reading: Reading) -> Iterator[BinaryIO]:
    with opened(Path(piece.path)) as (file, told):
        reading.read = lambda: max(told() - piece.start, 0)
        yield file


def _lines_before(piece: Piece) -> int:
    """Ends of lines before a piece; only an error asks for them."""
    if not piece.start:
        return 0
    count, left = 0, piece.start
    with open(piece.path, "rb") as file:
        while left and (block := file.read(min(left, BLOCK))):
            count, left = count + block.count(b"\n"), left - len(block)
    return count


def _read_json_lines(piece: Piece, key: str, reading: Reading, parse: Parse | None) -> Iterator[Record]:
    path, names = Path(piece.path), key.split(".")
    with _positioned(piece, reading) as file:
        place = piece.start
        if piece.start:  # a line that ends just before the piece is not of it, nor is one that reaches into it
            file.seek(piece.start - 1)
            place += len(file.readline()) - 1
        number = 0
        while (piece.stop is None or place < piece.stop) and (line := file.readline()):
            first, place = place == 0, place + len(line)
            line = line.removeprefix(codecs.BOM_UTF8) if first else line
            number += 1
            if not line.strip():
                continue
            try:
                entry = _entry_of_line(line)
                yield parse(entry) if parse is not None else _text_of_entry(entry, key, names)
            except ValueError as error:
                yield Bad(path, number + _lines_before_first(piece), str(error))


def _lines_before_first(piece: Piece) -> int:
    """Lines that begin before a piece."""
    if not piece.start:
        return 0
    with open(piece.path, "rb") as file:
        file.seek(piece.start - 1)
        reaches_in = file.read(1) != b"\n"
    return _lines_before(piece) + reaches_in


def _entry_of_line(line: bytes) -> Any:
    """What a line says. Raises ValueError where it is not JSON."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None


def _text_of_entry(entry: Any, key: str, names: list[str]) -> str:
    """The text of a line. Raises ValueError where it has none."""
    found: Any = entry
    if isinstance(entry, dict) and key in entry:
        found = entry[key]
    else:
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
    if not isinstance(found, str):
        raise ValueError(f'not an object with a string under "{key}"')
    return found


def _read_text(piece: Piece, reading: Reading) -> Iterator[Record]:
    path = Path(piece.path)
    with _positioned(piece, reading) as file:
        lines = 0  # ends of lines between the piece's start and the document's
        place = piece.start  # where the document begins
        left = b""
        if piece.start:
            skipped = _to_first_document(file, piece)
            if skipped is None:
                return
            place, left, lines = skipped
        while piece.stop is None or place < piece.stop:
            searched, whole = 0, True
            while (end := left.find(SEPARATOR, searched)) < 0:
                if len(left) >= PART_BYTES:
                    cut = _cut(left)
                    yield _decoded(path, piece, left[:cut], lines, place == 0, Part)
                    lines, place, left = lines + left.count(b"\n", 0, cut), place + cut, left[cut:]
                    whole = False
                searched = max(len(left) - len(SEPARATOR) + 1, 0)
                if not (block := file.read(BLOCK)):
                    break
                left += block
            document = left if end < 0 else left[:end]
            if document or not whole or end >= 0:
                yield _decoded(path, piece, document, lines, place == 0, str)
            if end < 0:
                return
            lines += document.count(b"\n")
            place, left = place + end + len(SEPARATOR), left[end + len(SEPARATOR) :]


def _to_first_document(file: BinaryIO, piece: Piece) -> tuple[int, bytes, int] | None:
    """Where the first document of a later piece begins, what was read beyond, and the lines before it in the piece."""
    begin = max(piece.start - len(SEPARATOR), 0)
    file.seek(begin)
    lines, left = 0, file.read(BLOCK)
    lines -= left.count(b"\n", 0, piece.start - begin)
    while (found := left.find(SEPARATOR)) < 0:
        block = file.read(BLOCK)
        if not block or (piece.stop is not None and begin + len(left) > piece.stop):
            return None
        keep = left[-len(SEPARATOR) + 1 :]
        lines, begin = lines + left.count(b"\n") - keep.count(b"\n"), begin + len(left) - len(keep)
        left = keep + block
    end = found + len(SEPARATOR)
    return begin + end, left[end:], lines + left.count(b"\n", 0, end)


def _cut(text: bytes) -> int:
    """Where a long document may be cut: before a word that begins a line, else before a space, else a character."""
    low = len(text) // 2
    end = len(text) - 4
    while (end := text.rfind(b"\n", low, end)) >= 0:
        if not text[end + 1 : end + 2].isspace():
            return end + 1
    if (space := text.rfind(b" ", low, len(text) - 4)) >= 0:
        return space
    end = len(text) - 4
    while text[end] & 0xC0 == 0x80:
        end -= 1
    return end


def _decoded(path: Path, piece: Piece, text: bytes, lines: int, first: bool, kind: type[str]) -> Record:
    if first:
        text = text.removeprefix(codecs.BOM_UTF8)
    try:
        return kind(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = 1 + lines + text.count(b"\n", 0, error.start) + _lines_before(piece)
        return Bad(path, line, f"not UTF-8: {error.reason}", more=kind is Part)


def _read_parquet(piece: Piece, key: str, reading: Reading, parse: Parse | None) -> Iterator[Record]:
    path = Path(piece.path)
    parquet = optional("pyarrow.parquet", path, "parquet")
    with _seekable(path) as source:
        try:
            file = parquet.ParquetFile(source)
        except Exception as error:  # a damaged file may raise anything
            raise BadLine(f"{path}: not a parquet file: {' '.join(str(error).split())}") from None
        with file:
            names = _column(file, path, key) if parse is None else []
            columns = None if parse is not None else [".".join(names)]
            row, batches = 0, None
            if piece.start or piece.stop is not None:
                stop = file.num_row_groups if piece.stop is None else piece.stop
                row = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
                batches = file.iter_batches(ROWS, list(range(piece.start, stop)), columns)
            batches = batches or file.iter_batches(ROWS, columns=columns)
            first = row
            reading.read = lambda: piece.size * (row - first) // max(_rows(file, piece), 1)
            while True:
                try:
                    batch = next(batches)
                    column = batch if parse is not None else batch.column(0)
                    for name in names[1:]:
                        column = optional("pyarrow.compute", path, "parquet").struct_field(column, name)
                    texts = column.to_pylist()
                except StopIteration:
                    return
                except Exception as error:
                    why = " ".join(str(error).split())
                    raise BadLine(f"{path}: damaged at row {row} or after it: {why}; get the file again") from None
                for text in texts:
                    if parse is not None:
                        try:
                            yield parse(_without_nulls(text))
                        except ValueError as error:
                            yield Bad(path, row, str(error), "row")
                    elif isinstance(text, str):
                        yield text
                    else:
                        yield Bad(path, row, f"the column '{key}' holds no string there", "row")
                    row += 1


def _without_nulls(value: Any) -> Any:
    """A row without the fields that are null: a struct has those of all others."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _rows(file: Any, piece: Piece) -> int:
    """Rows of a piece."""
    groups = range(piece.start, file.num_row_groups if piece.stop is None else piece.stop)
    return sum(file.metadata.row_group(group).num_rows for group in groups)


def _column(file: Any, path: Path, key: str) -> list[str]:
    """The names that lead to a column."""
    top = file.schema_arrow.names
    if key in top:
        return [key]
    names = key.split(".")
    field = file.schema_arrow.field(names[0]).type if names[0] in top else None
    for name in names[1:]:
        known = field is not None and hasattr(field, "get_field_index") and field.get_field_index(name) >= 0
        field = field.field(name).type if field is not None and known else None
    if field is None:
        raise BadLine(f"{path}: no column '{key}'; it has {', '.join(top)}")
    return names


@contextmanager
def _seekable(path: Path) -> Iterator[Any]:
    """Parquet is read from its end, so one that is compressed as a whole goes through a temporary file."""
    if not compression_of(path):
        yield path
        return
    with tempfile.TemporaryFile() as whole:
        with opened(path) as (text, _):
            shutil.copyfileobj(text, whole, BLOCK)
        whole.seek(0)
        yield whole
