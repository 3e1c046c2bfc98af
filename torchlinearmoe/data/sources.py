"""Files to documents.

A document is one text. Read are `.txt` files (one document, or several with `<|endoftext|>` between them), `.jsonl`
and `.json` files (one object a line, its text under `text`), `.parquet` files (a column `text`), and folders of these,
taken whole and in the order of their names. A folder that `store.py` wrote is taken as the tokens it holds.

What training writes is no data, wherever it lies inside such a folder: the tokens of a cache, checkpoints, and the
metrics of a run. So a second start reads what the first one read.
"""

from __future__ import annotations

import codecs
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from torchlinearmoe.data.store import is_cached, is_store
from torchlinearmoe.data.tokenizer import END_OF_TEXT
from torchlinearmoe.disk import expanded
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
    unknown: Mapping[str, int] = field(default_factory=dict)
    """Files of no known kind in folders: how many, by suffix, or by name where they have none."""


def find_sources(paths: Sequence[str | Path] = (), run_folder: Path | None = None) -> Sources:
    """The files and token folders under `paths`: in the order given, a folder's entries by name.

    No paths is the corpus that ships. `run_folder` is where a run is about to write, which may not look like a run's
    folder yet. A cached token folder that is itself one of `paths` is taken. Raises UserError, one line that names the
    path, when it does not exist or holds nothing to read.
    """
    found = _Found(run_folder.resolve() if run_folder else None)
    for path in [expanded(path, "data.paths") for path in paths] or [DEFAULT_CORPUS]:
        if not os.path.lexists(path):
            raise UserError(f"data.paths: '{path}' does not exist")
        if path.is_file() and path.suffix not in READERS:
            raise UserError(f"data.paths: '{path}' is of no known kind; legal: {', '.join(READERS)}, or a folder")
        if not (path.is_file() or path.is_dir() or path.is_symlink() or path.suffix in READERS):
            raise UserError(f"data.paths: '{path}' is no regular file and no folder; name one that is")
        before, ships = len(found.files) + len(found.stores), path.is_relative_to(Path(__file__).parent)
        if is_checkpoint(path):
            raise UserError(f"data.paths: '{path}' is a checkpoint; name the text it was trained on")
        if is_store(path):
            found.stores.append(path)
        else:
            found.collect(path)
        if ships:
            found.unknown.clear()
        if len(found.files) + len(found.stores) == before:
            but = f" but what training wrote in '{found.left_out[-1]}'" if found.left_out else ""
            raise UserError(f"data.paths: the folder '{path}' holds no {', '.join(READERS)} file{but}")
    files, stores, left_out = (tuple(dict.fromkeys(some)) for some in (found.files, found.stores, found.left_out))
    return Sources(files, stores, left_out, found.unknown)


def read_documents(files: Sequence[Path]) -> Iterator[str]:
    """The texts of `files`, file after file; texts of white space only are left out. Errors name file and line."""
    for path in files:
        for text in READERS[path.suffix](path):
            if text.strip():
                yield text if text.isascii() else _without_surrogates(text)


def _without_surrogates(text: str) -> str:
    """JSON can spell half a character; it becomes U+FFFD, so that every text has a UTF-8 form."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@dataclass
class _Found:
    """What a walk has come upon."""

    own: Path | None
    files: list[Path] = field(default_factory=list)
    stores: list[Path] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)

    def collect(self, path: Path, above: frozenset[tuple[int, int]] = frozenset()) -> None:
        """Take in a file, or a folder and all that is in it. above: the folders around it, by device and number."""
        known = path.suffix in READERS
        try:
            state = path.stat()
        except FileNotFoundError:
            state = None
        except OSError as error:
            raise UserError(f"data.paths: '{path}' cannot be read: {error.strerror}; mend or remove it") from None
        if state is None or not stat.S_ISDIR(state.st_mode):
            if known and state is None:
                raise UserError(f"data.paths: '{path}' is a link to nothing; mend or remove it")
            if known and state is not None and not stat.S_ISREG(state.st_mode):
                raise UserError(f"data.paths: '{path}' is no regular file; remove it or put a file there")
            if known:
                self.files.append(path)
            else:
                self.unknown[path.suffix or path.name] += 1
        elif is_cached(path):
            self.left_out.append(path.parent)
        elif is_checkpoint(path):
            self.left_out.append(path)
        elif is_store(path):
            self.stores.append(path)
        else:
            here = (state.st_dev, state.st_ino)
            if here in above:
                raise UserError(f"data.paths: '{path}' is a link to a folder around it; remove it")
            written = RUN_PARTS if is_run(path) or path.resolve() == self.own else ()
            for name in sorted(os.listdir(path)):
                if name in written:
                    self.left_out.append(path)
                elif not name.startswith("."):
                    self.collect(path / name, above | {here})


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of every line, without a byte order mark. Raises UserError for one that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
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
        except (ValueError, RecursionError) as error:
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
    except Exception as error:  # a damaged file may raise anything
        raise UserError(f"{path}: not a parquet file: {' '.join(str(error).split())}") from None
    with file:
        if "text" not in file.schema_arrow.names:
            raise UserError(f"{path}: no column 'text'; it has {', '.join(file.schema_arrow.names)}")
        row = 0
        batches = file.iter_batches(columns=["text"])
        while True:
            try:
                texts = next(batches).column(0).to_pylist()
            except StopIteration:
                return
            except Exception as error:
                why = " ".join(str(error).split())
                raise UserError(f"{path}: damaged at row {row} or after it: {why}; get the file again") from None
            for text in texts:
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
