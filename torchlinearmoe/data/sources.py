"""Files to documents.

A document is one text. Read are `.txt` files (one document, or several with `<|endoftext|>` between them), `.jsonl`
and `.json` files (one object a line, its text under `text`), `.parquet` files (a column `text`), and folders of these,
taken whole and in the order of their names. A folder that `store.py` wrote is taken as the tokens it holds.

What training writes is no data, wherever it lies inside such a folder: the tokens of a cache, checkpoints, and the
metrics of a run. So a second start reads what the first one read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from torchlinearmoe.data.store import is_cached, is_store
from torchlinearmoe.data.tokenizer import END_OF_TEXT
from torchlinearmoe.errors import UserError
from torchlinearmoe.written import RUN_PARTS, is_checkpoint, is_run

DEFAULT_CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class Sources:
    """What `data.paths` amounts to, in a fixed order."""

    files: tuple[Path, ...]
    """Text still to be tokenised."""
    stores: tuple[Path, ...]
    """Folders that already hold tokens."""
    left_out: tuple[Path, ...] = ()
    """Folders in which something was passed over because training wrote it."""


def find_sources(paths: Sequence[str | Path] = (), run_folder: Path | None = None) -> Sources:
    """The files and token folders under `paths`: in the order given, a folder's entries by name.

    No paths is the corpus that ships. `run_folder` is where a run is about to write, which may not look like a run's
    folder yet. A cached token folder that is itself one of `paths` is taken. Raises UserError, one line that names the
    path, when it does not exist or holds nothing to read.
    """
    files: list[Path] = []
    stores: list[Path] = []
    left_out: list[Path] = []
    own = run_folder.resolve() if run_folder else None
    for path in [Path(path).expanduser() for path in paths] or [DEFAULT_CORPUS]:
        if not path.exists():
            raise UserError(f"data.paths: '{path}' does not exist")
        if path.is_file() and path.suffix not in READERS:
            raise UserError(f"data.paths: '{path}' is of no known kind; legal: {', '.join(READERS)}, or a folder")
        before = len(files) + len(stores)
        if is_checkpoint(path):
            raise UserError(f"data.paths: '{path}' is a checkpoint; name the text it was trained on")
        if is_store(path):
            stores.append(path)
        else:
            _collect(path, own, files, stores, left_out)
        if len(files) + len(stores) == before:
            but = f" but what training wrote in '{left_out[-1]}'" if left_out else ""
            raise UserError(f"data.paths: the folder '{path}' holds no {', '.join(READERS)} file{but}")
    return Sources(*(tuple(dict.fromkeys(found)) for found in (files, stores, left_out)))


def read_documents(files: Sequence[Path]) -> Iterator[str]:
    """The texts of `files`, file after file; texts of white space only are left out. Errors name file and line."""
    for path in files:
        for text in READERS[path.suffix](path):
            if text.strip():
                yield text if text.isascii() else _without_surrogates(text)


def _without_surrogates(text: str) -> str:
    """JSON can spell half a character; it becomes U+FFFD, so that every text has a UTF-8 form."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _collect(path: Path, own: Path | None, files: list[Path], stores: list[Path], left_out: list[Path]) -> None:
    if path.is_file():
        if path.suffix in READERS:
            files.append(path)
    elif is_cached(path):
        left_out.append(path.parent)
    elif is_checkpoint(path):
        left_out.append(path)
    elif is_store(path):
        stores.append(path)
    else:
        written = RUN_PARTS if is_run(path) or path.resolve() == own else ()
        for name in sorted(os.listdir(path)):
            if name in written:
                left_out.append(path)
            elif not name.startswith("."):
                _collect(path / name, own, files, stores, left_out)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of every line. Raises UserError for one that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: not UTF-8: {error.reason}") from None


def _read_text(path: Path) -> Iterator[str]:
    document: list[str] = []
    for _, line in read_lines(path):
        first, *others = line.split(END_OF_TEXT)
        document.append(first)
        for part in others:
            yield "".join(document)
            document = [part]
    yield "".join(document)


def _read_json_lines(path: Path) -> Iterator[str]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise UserError(f'{path}, line {number}: not an object with a string under "text"')
        yield entry["text"]


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:  # pyarrow's ArrowInvalid
        raise UserError(f"{path}: not a parquet file: {' '.join(str(error).split())}") from None
    with file:
        if "text" not in file.schema_arrow.names:
            raise UserError(f"{path}: no column 'text'; it has {', '.join(file.schema_arrow.names)}")
        row = 0
        for batch in file.iter_batches(columns=["text"]):
            for value in batch.column(0):
                text = value.as_py()
                if not isinstance(text, str):
                    raise UserError(f"{path}, row {row}: the column 'text' holds no string there")
                row += 1
                yield text


READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".parquet": _read_parquet,
}
