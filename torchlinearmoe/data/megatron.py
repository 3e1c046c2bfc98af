"""Megatron's token files, `NAME.bin` and `NAME.idx`, read as they are through a memory map.

    NAME.bin     ids, one after the other, in the type that the index names
    NAME.idx     "MMIDIDX\\0\\0", version 1 and counts, little-endian; then of S sequences and D documents
                 int32 [S] lengths in tokens, int64 [S] places in bytes, int64 [D + 1] the first sequence of each
                 document, and S at the end

(megatron/core/datasets/indexed_dataset.py.) A document starts with a marker as in a token folder: it is put in front of
each by the index. Where documents end with the tokenizer's end of text (`--append-eod`), as all do or none, that one
is taken for the end that a token folder would have, so it is there once.

Nothing is known of the texts, so the number of a document decides which split it belongs to, and ids are taken to be
those of the run's tokenizer.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from torchlinearmoe.data.order import mix_all
from torchlinearmoe.data.store import TokenStore
from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""Whole numbers among the type codes of the index."""
LOOKED_AT = 1000
"""Documents whose last token tells whether documents end with the end of text."""


class Special(NamedTuple):
    """What the run's tokenizer says of ids."""

    end_of_text: int
    begin_of_text: int | None
    padding: int
    vocab_size: int
    fingerprint: str

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Special:
        """Of a tokenizer."""
        padding = tokenizer.end_of_text if tokenizer.padding is None else tokenizer.padding
        return cls(tokenizer.end_of_text, tokenizer.begin_of_text, padding, tokenizer.vocab_size, tokenizer.fingerprint)


def index_of(path: Path) -> Path | None:
    """The index that a path means: itself, that of a `.bin`, or that of both their names without the suffix."""
    if path.suffix in (".idx", ".bin"):
        path = path.with_suffix("")
    index, data = (path.with_name(path.name + suffix) for suffix in (".idx", ".bin"))
    return index if index.is_file() and data.is_file() else None


class MegatronStore(TokenStore):
    """A pair of files in the place of a token folder. Pickling sends its path."""

    def __init__(self, index: Path, special: Special) -> None:
        self.folder, self.known, self._special = index, None, special
        self.end_of_text, self.begin_of_text, self.padding, self.vocab_size, self.tokenizer_fingerprint = special
        self._open()
        raw = self._place(self.num_documents)
        if raw != len(self._ids):
            raise self._wrong(f"the index tells of {raw} tokens, {index.with_suffix('.bin').name} has {len(self._ids)}")
        looked_at = np.unique(np.linspace(1, self.num_documents, min(LOOKED_AT, self.num_documents)).astype(np.int64))
        self.ends = bool((self._ids[self._places(looked_at) - 1] == self.end_of_text).all())
        """Whether documents end with the end of text in the file."""
        # Ids of a document that are not in the file; an end in the file stands for the next one's marker.
        self._added = (1 if self.begin_of_text is None else 2) - self.ends
        self.num_tokens = raw + self._added * self.num_documents

    def _open(self) -> None:
        index, data = self.folder, self.folder.with_suffix(".bin")
        try:
            with index.open("rb") as file:
                header = file.read(HEADER.size)
            magic, version, code, sequences, documents = HEADER.unpack(header)
            if magic != MAGIC or version != 1 or code not in TYPES:
                raise ValueError(f"version {version} and type {code} of the index are not known")
            if not sequences or documents < 2:
                raise ValueError("it has no document")
            self.num_documents = documents - 1
            at = HEADER.size + 4 * sequences
            # As plain arrays, of which single numbers are read ten times as fast.
            self._lengths = np.asarray(np.memmap(index, "<i4", "r", HEADER.size, (sequences,)))
            self._pointers = np.asarray(np.memmap(index, "<i8", "r", at, (sequences,)))
            self._firsts = np.asarray(np.memmap(index, "<i8", "r", at + 8 * sequences, (documents,)))
            self._ids = np.asarray(np.memmap(data, np.dtype(TYPES[code]).newbyteorder("<"), "r"))
            if self._firsts[0] != 0 or self._firsts[-1] != sequences or self._pointers[0] != 0:
                raise ValueError("its documents are not all of its sequences")
        except (OSError, ValueError, struct.error) as error:
            raise self._wrong(error) from None

    def _wrong(self, why: object) -> UserError:
        return UserError(f"{self.folder}: not a Megatron index, or damaged: {why}; make it again")

    def _places(self, documents: np.ndarray) -> np.ndarray:
        """int64: where documents begin in the file, in tokens; for the number of them, where the last ends."""
        sequences = self._firsts[documents]
        last = len(self._pointers) - 1
        inside = self._pointers[np.minimum(sequences, last)] // self._ids.itemsize
        return inside + np.where(sequences > last, self._lengths[last], 0)

    def _place(self, document: int) -> int:
        sequence, last = int(self._firsts[document]), len(self._pointers) - 1
        if sequence > last:
            return int(self._pointers[last]) // self._ids.itemsize + int(self._lengths[last])
        return int(self._pointers[sequence]) // self._ids.itemsize

    def _offset(self, document: int) -> int:
        return self._place(document) + self._added * document

    @property
    def offsets(self) -> np.ndarray:
        """int64 [num_documents + 1]: document d is read from offsets[d] to offsets[d + 1]. Made when asked for."""
        documents = np.arange(self.num_documents + 1)
        return self._places(documents) + self._added * documents

    @property
    def keys(self) -> np.ndarray:
        """uint64 [num_documents]: SplitMix64 of the numbers of the documents. Made when asked for."""
        return mix_all(np.arange(self.num_documents, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))

    def borders(self, start: int, stop: int) -> np.ndarray:
        """int64: where documents begin, from the last one at `start` or before it to the first at `stop` or after it;
        behind the last document, where it ends."""
        everyone = range(self.num_documents + 1)
        first = bisect_right(everyone, start, key=self._offset) - 1
        documents = np.arange(first, bisect_left(everyone, stop, key=self._offset) + 1)
        return self._places(documents) + self._added * documents

    def read(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: the ids from `start` on. Raises UserError for one that the tokenizer does not have."""
        if stop <= start:
            return np.empty(0, dtype=np.int64)
        if not self._added:  # the end of a document is the next one's marker
            ids = self._ids[max(start - 1, 0) : stop - 1].astype(np.int64)
            ids = ids if start else np.concatenate([[self.end_of_text], ids])[:stop]
        else:
            ids = self._with_markers(start, stop)
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            wrong = int(ids.max()) if ids.max() >= self.vocab_size else int(ids.min())
            raise UserError(
                f"{self.folder}: {wrong} is none of the {self.vocab_size} ids of data.tokenizer; name the tokenizer "
                "that it was made with"
            )
        return ids

    def _with_markers(self, start: int, stop: int) -> np.ndarray:
        everyone = range(self.num_documents + 1)
        first = bisect_right(everyone, start, key=self._offset) - 1  # the document that has `start`
        documents = np.arange(first, bisect_left(everyone, stop, key=self._offset) + 1)
        places = self._places(documents)
        begins = places + self._added * documents
        ids = np.empty(begins[-1] - begins[0], dtype=np.int64)
        marked = np.zeros(len(ids), dtype=bool)
        marked[begins[:-1] - begins[0]] = True
        ids[begins[:-1] - begins[0]] = self.start
        if self.begin_of_text is not None and not self.ends:
            marked[begins[1:] - begins[0] - 1] = True
            ids[begins[1:] - begins[0] - 1] = self.end_of_text
        ids[~marked] = self._ids[places[0] : places[-1]]
        return ids[start - begins[0] : stop - begins[0]]

    def __reduce__(self) -> tuple[Any, tuple[Path, Special]]:
        return MegatronStore, (self.folder, self._special)
