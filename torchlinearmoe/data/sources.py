"""Files to documents.

A document is one text. Read are `.txt` files (one document, or several with `<|endoftext|>` between them), `.jsonl`
and `.json` files (one object a line, its text under `text`), `.parquet` files (a column `text`), these compressed by
gzip, zstd or bzip2, and folders of them, taken whole and in the order of their names. A folder that `store.py` or
`prepare.py` wrote is taken as the tokens it holds, as are Megatron's `.bin` with their `.idx`.

What training writes is no data, wherever it lies inside such a folder: the tokens of a cache, checkpoints, and the
metrics of a run. So a second start reads what the first one read.
"""

from __future__ import annotations

import codecs
import glob
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torchlinearmoe.data.formats import KINDS, LEGAL, kind_of, opened
from torchlinearmoe.data.megatron import index_of
from torchlinearmoe.data.prepared import is_cached, is_prepared, is_tokens
from torchlinearmoe.data.records import Bad, BadLine, Part, Piece, read_records
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


def find_sources(
    paths: Sequence[str | Path] = (), run_folder: Path | None = None, named: str = "data.paths"
) -> Sources:
    """The files and token folders under `paths`: in the order given, a folder's entries and what a glob finds by name.

    `named` is what errors call the paths. No paths is the corpus that ships. `run_folder` is where a run is about to
    write, which may not look like a run's folder yet. A cached token folder that is itself one of `paths` is taken.
    Raises UserError, one line that names the path, when it does not exist or holds nothing to read.
    """
    found = _Found(run_folder.resolve() if run_folder else None, named)
    for path in [each for name in paths for each in _globbed(expanded(name, named))] or [DEFAULT_CORPUS]:
        if (index := index_of(path)) is not None and not path.is_dir():
            found.stores.append(index)
            continue
        if not os.path.lexists(path):
            raise UserError(
                f"{named}: '{path}' does not exist; name a file, a folder or a pattern of files that are there"
            )
        if path.is_file() and kind_of(path) is None:
            raise UserError(f"{named}: '{path}' is of no known kind; legal: {LEGAL}, or a folder")
        if not (path.is_file() or path.is_dir() or path.is_symlink() or kind_of(path) is not None):
            raise UserError(f"{named}: '{path}' is no regular file and no folder; name one that is")
        before, ships = len(found.files) + len(found.stores), path.is_relative_to(Path(__file__).parent)
        if is_checkpoint(path):
            raise UserError(f"{named}: '{path}' is a checkpoint; name the text it was trained on")
        if is_tokens(path):
            found.stores.append(path)
        else:
            found.collect(path)
        if ships:
            found.unknown.clear()
        if len(found.files) + len(found.stores) == before:
            but = f" but what training wrote in '{found.left_out[-1]}'" if found.left_out else ""
            raise UserError(f"{named}: the folder '{path}' holds no {', '.join(KINDS)} file{but}")
    files, stores, left_out = (tuple(dict.fromkeys(some)) for some in (found.files, found.stores, found.left_out))
    return Sources(files, stores, left_out, found.unknown)


def find_messages(paths: Sequence[str | Path], run_folder: Path | None = None, named: str = "data.paths") -> Sources:
    """The same for files of messages. Raises UserError for what cannot hold any."""
    found = find_sources(paths, run_folder, named)
    for file in found.files:
        if kind_of(file) == ".txt":
            raise UserError(f"{named}: '{file}': data.format = 'messages' needs JSONL files or parquet")
    return found


def _globbed(path: Path) -> list[Path]:
    """What a pattern of names finds; a path that is none, or is there as it stands, is itself."""
    if os.path.lexists(path) or not glob.has_magic(str(path)):
        return [path]
    return [Path(name) for name in sorted(glob.glob(str(path), recursive=True))] or [path]


def read_documents(files: Sequence[Path], key: str = "text") -> Iterator[str]:
    """The texts of `files`, file after file; texts of white space only are left out. Errors name file and line."""
    begun: list[str] = []
    for path in files:
        for record in read_records(Piece(str(path)), key):
            if isinstance(record, Bad):
                raise BadLine(str(record))
            assert isinstance(record, str)  # no file of messages
            if isinstance(record, Part):
                begun.append(record)
                continue
            text = "".join([*begun, record]) if begun else record
            begun = []
            if text.strip():
                yield text


@dataclass
class _Found:
    """What a walk has come upon."""

    own: Path | None
    named: str
    files: list[Path] = field(default_factory=list)
    stores: list[Path] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)

    def collect(self, path: Path, above: frozenset[tuple[int, int]] = frozenset()) -> None:
        """Take in a file, or a folder and all that is in it. above: the folders around it, by device and number."""
        known = kind_of(path) is not None
        try:
            state = path.stat()
        except FileNotFoundError:
            state = None
        except OSError as error:
            raise UserError(f"{self.named}: '{path}' cannot be read: {error.strerror}; mend or remove it") from None
        if state is None or not stat.S_ISDIR(state.st_mode):
            if known and state is None:
                raise UserError(f"{self.named}: '{path}' is a link to nothing; mend or remove it")
            if known and state is not None and not stat.S_ISREG(state.st_mode):
                raise UserError(f"{self.named}: '{path}' is no regular file; remove it or put a file there")
            if known:
                self.files.append(path)
            elif (index := index_of(path)) is not None and path.suffix in (".idx", ".bin"):
                self.stores += [index] if path.suffix == ".idx" else []
            else:
                self.unknown[path.suffix or path.name] += 1
        elif is_cached(path):
            self.left_out.append(path.parent)
        elif is_prepared(path) and path.resolve() == self.own or is_checkpoint(path):
            self.left_out.append(path)
        elif is_tokens(path):
            self.stores.append(path)
        else:
            here = (state.st_dev, state.st_ino)
            if here in above:
                raise UserError(f"{self.named}: '{path}' is a link to a folder around it; remove it")
            written = RUN_PARTS if is_run(path) or path.resolve() == self.own else ()
            for name in sorted(os.listdir(path)):
                if name in written:
                    self.left_out.append(path)
                elif not name.startswith("."):
                    self.collect(path / name, above | {here})


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of every line, without a byte order mark. Raises UserError for one that is not UTF-8."""
    with opened(path) as (file, _):
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not UTF-8: {error.reason}; mend the line or take it out"
                ) from None
