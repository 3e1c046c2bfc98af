"""A folder of token ids: what tokenising leaves behind, and what training reads through a memory map.

    tokens.npy      uint16, or uint32 for more than 65,536 ids: of each document, its start marker (the end-of-text id)
                    and its tokens
    offsets.npy     int64 [documents + 1]: document d is tokens[offsets[d] : offsets[d + 1]]
    keys.npy        uint64 [documents]: hash of the document's text; decides which split it belongs to
    store.json      format, tokenizer, counts

Folders are written aside and renamed, so a folder that exists is complete, and several processes may write the same one
at once: the first to finish wins, the others find its work.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp
from typing import BinaryIO

import numpy as np

from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.errors import UserError

FORMAT = 1
DESCRIPTION = "store.json"
BATCH_CHARACTERS = 4_000_000
"""Text handed to the tokenizer at once."""

Progress = Callable[[int, int], None]
"""Called with (documents, tokens) done so far."""


class TokenStore:
    """A written folder, open for reading. Pickling sends its path, not its tokens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            if described["format"] != FORMAT:
                raise UserError(f"{folder}: token folder of format {described['format']}, this version reads {FORMAT}")
            self.num_documents: int = described["documents"]
            self.num_tokens: int = described["tokens"]
            self.end_of_text: int = described["end_of_text"]
            self.vocab_size: int = described["vocab_size"]
            self.tokenizer_fingerprint: str = described["tokenizer_fingerprint"]
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise UserError(f"{folder}: not a token folder: {type(error).__name__}: {error}") from None

    @cached_property
    def tokens(self) -> np.ndarray:
        """uint16 or uint32 [num_tokens], memory-mapped."""
        return np.load(self.folder / "tokens.npy", mmap_mode="r")

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [num_documents + 1], memory-mapped."""
        return np.load(self.folder / "offsets.npy", mmap_mode="r")

    @cached_property
    def keys(self) -> np.ndarray:
        """uint64 [num_documents], memory-mapped."""
        return np.load(self.folder / "keys.npy", mmap_mode="r")

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        return TokenStore, (self.folder,)


def is_store(folder: Path) -> bool:
    """Whether `write_store` made this folder."""
    return (folder / DESCRIPTION).is_file()


def write_store(
    folder: Path, documents: Iterable[str], tokenizer: Tokenizer, progress: Progress | None = None
) -> TokenStore:
    """Tokenises `documents` into `folder`, which appears when all is done. Raises UserError when there are none."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cannot write tokens to '{folder.parent}': {error.strerror}") from None
    try:
        _write(aside, documents, tokenizer, progress)
        os.chmod(aside, 0o755)  # mkdtemp keeps others out
        try:
            aside.rename(folder)
        except OSError:
            if not is_store(folder):
                raise UserError(f"{folder}: cannot write there, the folder is in use by something else") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return TokenStore(folder)


def cached_store(
    files: Sequence[Path],
    read: Callable[[Sequence[Path]], Iterable[str]],
    tokenizer: Tokenizer,
    cache: Path,
    progress: Progress | None = None,
) -> TokenStore:
    """The tokens of `files`, from `cache` if they are there, else tokenised into it.

    The folder's name is a hash of the tokenizer and of every file's path, size and time of change. Any number of
    processes may ask at once; to do the work once, let one ask before the others.
    """
    told = [str(FORMAT), tokenizer.fingerprint]
    for file in files:
        state = file.stat()
        told.append(f"{file.resolve()} {state.st_size} {state.st_mtime_ns}")
    folder = cache / hashlib.blake2b("\n".join(told).encode(), digest_size=12).hexdigest()
    return TokenStore(folder) if is_store(folder) else write_store(folder, read(files), tokenizer, progress)


def document_key(text: str) -> int:
    """64 bits that are the same for the same text on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _write(folder: Path, documents: Iterable[str], tokenizer: Tokenizer, progress: Progress | None) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    num_documents = num_tokens = 0
    with (
        _GrowingArray(folder / "tokens.npy", dtype) as tokens,
        _GrowingArray(folder / "offsets.npy", np.dtype(np.int64)) as offsets,
        _GrowingArray(folder / "keys.npy", np.dtype(np.uint64)) as keys,
    ):
        offsets.append([0])
        for texts in _batches(documents):
            for text, ids in zip(texts, tokenizer.encode_batch(texts)):
                tokens.append([tokenizer.end_of_text, *ids])
                num_tokens += 1 + len(ids)
                offsets.append([num_tokens])
                keys.append([document_key(text)])
            num_documents += len(texts)
            if progress is not None:
                progress(num_documents, num_tokens)
    if num_documents == 0:
        raise UserError("data.paths: the files hold no text")
    described = {
        "format": FORMAT,
        "documents": num_documents,
        "tokens": num_tokens,
        "tokenizer": tokenizer.path.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
    }
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


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

    def append(self, values: Sequence[int]) -> None:
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
