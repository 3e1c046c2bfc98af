"""A folder of token ids: what tokenising leaves behind, and what training reads through a memory map.

    tokens.npy      uint16, or uint32 for more than 65,536 ids: of each document, its start marker and its tokens; then,
                    where the marker is a begin-of-text id and not the end-of-text id itself, the end-of-text id
    offsets.npy     int64 [documents + 1]: document d is tokens[offsets[d] : offsets[d + 1]]
    keys.npy        uint64 [documents]: hash of the document's text; decides which split it belongs to
    trained.npy     uint8 like tokens, where not all are trained: 1 for those that are
    store.json      format, tokenizer, counts

Folders are written aside and renamed, so a folder that exists is complete, and several processes may write the same one
at once: the first to finish wins, the others find its work.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from torchlinearmoe import disk
from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.errors import UserError, visible
from torchlinearmoe.processes import is_alive

logger = logging.getLogger(__name__)

FORMAT = 1
NAME_BYTES = 12
"""Of the hash that names a folder of a cache."""
DESCRIPTION = "store.json"
ORPHAN = re.compile(r"\.[^/]+-(?P<host>[^/]+)-(?P<pid>\d{1,9})-\w+")
"""A folder that a process writes into."""
MOST_OPEN = 256
"""Folders with a manifest that are open at once; each takes two or three of the files that a process may open."""
BATCH_CHARACTERS = 4_000_000
"""Text handed to the tokenizer at once."""

Progress = Callable[[int, int], None]
"""Called with (documents, tokens) done so far."""


class Encoded(NamedTuple):
    """One document, ready to be written."""

    key: int
    """64 bits that decide its split."""
    ids: Sequence[int] | np.ndarray
    """Start marker and tokens, the end-of-text id where it is no start marker; or an array of them."""
    trained: Sequence[bool] | None = None
    """Which ids are trained; None for all. The same kind for all documents of a store."""
    ends: bool = True
    """Whether the document ends here; else the next one goes on with it, and has its key."""


class TokenStore:
    """A written folder, open for reading. Pickling sends its path, not its tokens.

    `known` is what a manifest with its checksums tells of it: nothing is read then before it is used, offsets are not
    gone through, and no more than MOST_OPEN of such folders are open at once.
    """

    def __init__(self, folder: Path, known: Mapping[str, Any] | None = None) -> None:
        self.folder, self.known = folder, known
        try:
            described = known or json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            if described["format"] != FORMAT:
                raise UserError(f"{folder}: token folder of format {described['format']}, this version reads {FORMAT}")
            self.num_documents: int = described["documents"]
            self.num_tokens: int = described["tokens"]
            self.end_of_text: int = described["end_of_text"]
            # Folders of earlier versions know of no other special id.
            self.begin_of_text: int | None = described.get("begin_of_text")
            self.padding: int = described.get("padding", self.end_of_text)
            self.vocab_size: int = described["vocab_size"]
            self.tokenizer_fingerprint: str = described["tokenizer_fingerprint"]
            self._check_counts()
            if known is None:
                self._check()
        except UserError:
            raise
        except Exception as error:  # a damaged array may raise anything
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> UserError:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        return UserError(f"{self.folder}: not a token folder, or damaged: {why}; make it again")

    def _check_counts(self) -> None:
        """Raise ValueError where the description is none."""
        counts = (self.num_documents, self.num_tokens, self.vocab_size, self.end_of_text, self.start, self.padding)
        if not all(type(number) is int and number >= 0 for number in counts) or not self.num_documents:
            raise ValueError(f"{DESCRIPTION} does not count documents, tokens and ids")
        if max(self.end_of_text, self.start, self.padding) >= self.vocab_size:
            raise ValueError(f"{DESCRIPTION}: a special id lies beyond the {self.vocab_size} ids of its tokenizer")

    def _check(self, trusted: bool = False) -> None:
        """Raise ValueError where the arrays are not those that the description tells of; `trusted`: by their ends."""
        wanted = {"tokens": (self.num_tokens, "u2 u4"), "offsets": (self.num_documents + 1, "i8")}
        wanted |= {"keys": (self.num_documents, "u8")}
        if (self.folder / "trained.npy").exists():
            wanted["trained"] = (self.num_tokens, "u1")
        for name, (length, kinds) in wanted.items():
            array = self._load(name)
            if array.shape != (length,) or array.dtype.str[1:] not in kinds.split():
                raise ValueError(f"{name}.npy holds {array.dtype} {list(array.shape)}, not {length} of {kinds}")
        ends = self._load("offsets")
        rise = trusted or bool((ends[1:] > ends[:-1]).all())
        if ends[0] != 0 or ends[-1] != self.num_tokens or not rise:
            raise ValueError("offsets.npy does not go from 0 to the last token, document by document")

    def check(self, trusted: bool = False) -> None:
        """Raise UserError where the folder is damaged; `trusted`: as far as that shows without reading arrays."""
        try:
            self._check(trusted)
        except Exception as error:
            raise self._damaged(error) from None

    def _load(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    def _array(self, name: str) -> np.ndarray:
        """An array, memory-mapped; folders with a manifest are closed again, the longest unused first."""
        if self.known is None:
            return self._load(name)
        if self not in _opened:
            self.check(trusted=True)
            _opened[self] = None
        if len(_opened) > MOST_OPEN:
            _opened.popitem(last=False)[0].close()
        return self._load(name)

    def close(self) -> None:
        """Let go of the arrays; they are opened again where they are asked for."""
        for name in ("tokens", "offsets", "keys", "trained"):
            self.__dict__.pop(name, None)

    def read(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: the ids from `start` on. Raises UserError for one that the tokenizer does not have."""
        if self in _opened:
            _opened.move_to_end(self)
        ids = self.tokens[start:stop].astype(np.int64)
        if ids.size and (wrong := int(ids.max())) >= self.vocab_size:
            raise UserError(f"{self.folder}: damaged: {wrong} is none of its {self.vocab_size} ids; make it again")
        return ids

    def borders(self, start: int, stop: int) -> np.ndarray:
        """int64: where documents begin, from the last one at `start` or before it to the first at `stop` or after it;
        behind the last document, where it ends."""
        first = int(np.searchsorted(self.offsets, start, side="right")) - 1
        return np.array(self.offsets[first : int(np.searchsorted(self.offsets, stop, side="left")) + 1])

    @property
    def start(self) -> int:
        """The id that starts every document."""
        return self.end_of_text if self.begin_of_text is None else self.begin_of_text

    @cached_property
    def tokens(self) -> np.ndarray:
        """uint16 or uint32 [num_tokens], memory-mapped."""
        return self._array("tokens")

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [num_documents + 1], memory-mapped."""
        return self._array("offsets")

    @cached_property
    def keys(self) -> np.ndarray:
        """uint64 [num_documents], memory-mapped."""
        return self._array("keys")

    @cached_property
    def trained(self) -> np.ndarray:
        """uint8 [num_tokens], memory-mapped: 1 for a token that is trained. Only stores of conversations have it."""
        return self._array("trained")

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path, Mapping[str, Any] | None]]:
        return TokenStore, (self.folder, self.known)


_opened: OrderedDict[TokenStore, None] = OrderedDict()
"""Open folders that have a manifest, the last used at the end."""


def is_store(folder: Path) -> bool:
    """Whether `write_store` made this folder."""
    return (folder / DESCRIPTION).is_file()


def write_store(
    folder: Path, documents: Iterable[str], tokenizer: Tokenizer, progress: Progress | None = None
) -> TokenStore:
    """Tokenises `documents` into `folder`, which appears when all is done. Raises UserError when there are none."""
    return write_encoded(folder, encode_texts(documents, tokenizer), tokenizer, progress)


def write_encoded(
    folder: Path, batches: Iterable[list[Encoded]], tokenizer: Tokenizer, progress: Progress | None = None
) -> TokenStore:
    """Writes encoded documents into `folder`, which appears when all is done. Raises UserError when there are none."""
    with written_aside(folder, is_store) as aside:
        if not write_arrays(aside, batches, tokenizer, progress):
            raise UserError("data.paths: the files hold no text; name files that do")
    return TokenStore(folder)


@contextmanager
def written_aside(
    folder: Path,
    is_written: Callable[[Path], bool],
    way_out: str = "make room there, or set data.cache",
    named: Path | None = None,
) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` at the end of the block, on disk and whole, or not at all.

    `is_written` tells one that another process was first with. Raises UserError for what the disk refuses, which names
    the folder around it, or `named`.
    """
    told = f"cannot write tokens to '{named or folder.parent}'"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_orphans(folder.parent)
        aside = Path(mkdtemp(prefix=f".{folder.name}-{socket.gethostname()}-{os.getpid()}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"{told}: {error.strerror}; {way_out}") from None
    try:
        with disk.one_line(told, lambda: way_out):
            yield aside
            os.chmod(aside, 0o755)  # mkdtemp keeps others out
            for written in [*aside.iterdir(), aside]:
                disk.sync(written)
        try:
            aside.rename(folder)
        except OSError:
            if not is_written(folder):
                raise UserError(f"{folder}: cannot write there, the folder is in use by something else") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_orphans(cache: Path) -> None:
    """Delete what writers left half done that were killed on this host; those of others may still live."""
    for path in cache.glob(".*"):
        left = ORPHAN.fullmatch(path.name)
        if left and left["host"] == socket.gethostname() and not is_alive(int(left["pid"])):
            shutil.rmtree(path, ignore_errors=True)


def encode_texts(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[Encoded]]:
    """Texts to documents whose every token is trained, batch by batch."""
    end = [] if tokenizer.begin_of_text is None else [tokenizer.end_of_text]
    for texts in _batches(documents):
        ids = tokenizer.encode_arrays(texts)
        yield [Encoded(document_key(text), framed([tokenizer.start], found, end)) for text, found in zip(texts, ids)]


def framed(before: list[int], ids: Sequence[int] | np.ndarray, after: list[int]) -> Sequence[int] | np.ndarray:
    """Ids with others around them, in the form that they have."""
    if isinstance(ids, np.ndarray):
        return np.concatenate([np.array(before, ids.dtype), ids, np.array(after, ids.dtype)])
    return [*before, *ids, *after]


def cached_store(
    files: Sequence[Path],
    read: Callable[[Sequence[Path]], Iterable[Any]],
    tokenizer: Tokenizer,
    cache: Path,
    progress: Progress | None = None,
    *,
    encode: Callable[[Iterable[Any], Tokenizer], Iterable[list[Encoded]]] = encode_texts,
    told: str = "",
    folder: Path | None = None,
) -> TokenStore:
    """The tokens of `files`, from `cache` if they are there, else read and encoded into it.

    The folder's name is a hash of the tokenizer, of every file's path, size and time of change, and of `told`, which
    stands for everything else that `encode` depends on. Any number of processes may ask at once; to do the work once,
    let one ask before the others and tell them its `folder`, which is then taken without another look at the files.
    """
    folder = folder or cache / name_of(files, tokenizer, told)
    if folder.exists():  # whole, or damaged since it came
        try:
            return TokenStore(folder)
        except UserError as error:
            take_away(folder, error)
    return write_encoded(folder, encode(read(files), tokenizer), tokenizer, progress)


def take_away(folder: Path, damage: UserError) -> None:
    """Remove a folder of a cache that is damaged, and say so."""
    logger.warning("%s; its text is read again", visible(str(damage)))
    aside = folder.with_name(f".{folder.name}-{socket.gethostname()}-{os.getpid()}-damaged")
    with suppress(OSError):
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def name_of(files: Sequence[Path], tokenizer: Tokenizer, told: str) -> str:
    begin = [] if tokenizer.begin_of_text is None else [f"begin of text {tokenizer.begin_of_text}"]
    known = [str(FORMAT), tokenizer.fingerprint, *begin, *([told] if told else [])]
    for file in files:
        state = file.stat()
        known.append(f"{file.resolve()} {state.st_size} {state.st_mtime_ns}")
    return hashlib.blake2b("\n".join(known).encode(), digest_size=NAME_BYTES).hexdigest()


def document_key(text: str) -> int:
    """64 bits that are the same for the same text on every machine."""
    return key_of(hashlib.blake2b(text.encode(), digest_size=8))


def key_of(digest: Any) -> int:
    """The key of a document, of the blake2b hash of its text, of 8 bytes."""
    return int.from_bytes(digest.digest(), "little")


def write_arrays(
    folder: Path, batches: Iterable[list[Encoded]], tokenizer: Tokenizer, progress: Progress | None = None
) -> int:
    """Writes encoded documents into a folder and returns how many; without any it is no token folder."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    num_documents = num_tokens = 0
    with ExitStack() as open_files:

        def array(name: str, kind: np.dtype | type) -> _GrowingArray:
            return open_files.enter_context(_GrowingArray(folder / f"{name}.npy", np.dtype(kind)))

        tokens, offsets, keys = array("tokens", dtype), array("offsets", np.int64), array("keys", np.uint64)
        trained: _GrowingArray | None = None
        offsets.append([0])
        for batch in batches:
            stops: list[int] = []
            for document in batch:
                tokens.append(document.ids)
                num_tokens += len(document.ids)
                if document.ends:
                    stops.append(num_tokens)
                if document.trained is not None:
                    trained = trained or array("trained", np.uint8)
                    trained.append(document.trained)
            num_documents += len(stops)
            offsets.append(stops)
            keys.append(np.array([document.key for document in batch if document.ends], np.uint64))
            if progress is not None:
                progress(num_documents, num_tokens)
    if num_documents == 0:
        return 0
    described = {
        "format": FORMAT,
        "documents": num_documents,
        "tokens": num_tokens,
        "tokenizer": tokenizer.path.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "begin_of_text": tokenizer.begin_of_text,
        "padding": tokenizer.end_of_text if tokenizer.padding is None else tokenizer.padding,
    }
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return num_documents


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Lists of documents of about BATCH_CHARACTERS together."""
    texts: list[str] = []
    characters = 0
    for text in documents:
        texts.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


class _GrowingArray:
    """A one-dimensional .npy file whose length is known only at the end: its header is written twice."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._path = path
        self._dtype = dtype
        self._length = 0

    def __enter__(self) -> _GrowingArray:
        self._file: BinaryIO = self._path.open("wb")
        self._write_header()
        return self

    def append(self, values: Sequence[int] | np.ndarray) -> None:
        self._file.write(np.asarray(values, dtype=self._dtype).tobytes())
        self._length += len(values)

    def __exit__(self, *_: object) -> None:
        end_of_header = self._file.tell() - self._length * self._dtype.itemsize
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == end_of_header, "numpy leaves room in the header for the length to grow"
        self._file.close()

    def _write_header(self) -> None:
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)
