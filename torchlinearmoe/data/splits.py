"""Training and held-out text as two streams of tokens.

A document belongs to the held-out split when the hash of its text falls under `validation_fraction`: whole documents,
no matter which other documents there are, and two copies of a text never on both sides. Split by tokens, the last share
of the stream of all documents is held out, which may begin inside one.

A stream is, document after document, the start marker and the document's tokens, and a last marker at the end:

    <|endoftext|> a b c <|endoftext|> d e <|endoftext|>

so that the target of a document's last token is the end of text. With a tokenizer that begins texts with a token of its
own, that one is the start marker, and every document has its end:

    <s> a b c </s> <s> d e </s>
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np

from torchlinearmoe.data.packing import Samples, SampleSource
from torchlinearmoe.data.shared import Decide, alone, open_stores
from torchlinearmoe.data.sources import find_sources, read_documents
from torchlinearmoe.data.store import Progress, TokenStore, cached_store
from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.disk import expanded
from torchlinearmoe.errors import UserError

DEFAULT_CACHE = Path("~/.cache/torchlinearmoe")


class TokenStream:
    """The documents of one split as one sequence of ids, read at any place.

    Neighbouring documents of the split lie side by side on disk, so the stream is kept as runs of them: run r is
    `tokens[_sources[r] : ...]` of store `_stores[r]` and fills the places `_starts[r]` .. `_starts[r + 1] - 1`.
    """

    def __init__(self, stores: Sequence[TokenStore], chosen: Sequence[np.ndarray]) -> None:
        """`chosen[i]`: bool [documents], the documents of `stores[i]` that belong to the stream, in order."""
        self._all_stores = list(stores)
        self.num_documents = int(sum(int(mask.sum()) for mask in chosen))
        self.start, self.padding = stores[0].start, stores[0].padding
        self._last = [stores[0].end_of_text] if stores[0].begin_of_text is None else []
        store_of, sources, lengths = [], [], []
        for index, (store, mask) in enumerate(zip(stores, chosen)):
            edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
            first, last = edges[::2], edges[1::2]
            store_of.append(np.full(len(first), index, dtype=np.int32))
            sources.append(store.offsets[first])
            lengths.append(store.offsets[last] - store.offsets[first])
        self._stores = np.concatenate(store_of)
        self._sources = np.concatenate(sources)
        self._starts = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
        self._first, self._len = 0, int(self._starts[-1]) + len(self._last) if self.num_documents else 0

    def __len__(self) -> int:
        """Ids in the stream, the last marker included; 0 when no document belongs to it."""
        return self._len

    def part(self, start: int, stop: int) -> TokenStream:
        """The places start .. stop - 1 of a stream of all documents as a stream."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        ends = np.cumsum(np.concatenate([np.diff(store.offsets) for store in self._all_stores]))
        begins = np.concatenate([[0], ends[:-1]])
        part = copy(self)
        part._first, part._len = self._first + start, stop - start
        part.num_documents = int(((ends > start) & (begins < stop)).sum())
        return part

    def samples(self, length: int, tail: bool = False) -> Samples:
        """The stream cut every `length` tokens; with `tail` a last, shorter piece too."""
        return Samples(self, length, tail)

    def shortage(self) -> str:
        """Why there may be no sample of some length."""
        return f"the training text has only {len(self)} tokens; shorten it or bring more text in data.paths"

    def note(self, length: int) -> str | None:
        """Nothing: every token is trained."""
        return None

    def read(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: the ids at places start .. stop - 1."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        start, stop = start + self._first, stop + self._first
        out = np.empty(stop - start, dtype=np.int64)
        place = start
        run = int(np.searchsorted(self._starts, start, side="right")) - 1
        while place < stop:
            if run == len(self._stores):
                out[place - start :] = self._last
                break
            end = min(stop, int(self._starts[run + 1]))
            source = int(self._sources[run]) + place - int(self._starts[run])
            out[place - start : end - start] = self._all_stores[self._stores[run]].read(source, source + end - place)
            place, run = end, run + 1
        return out


class Stream(Protocol):
    """One split of the data: what it can be cut into."""

    num_documents: int

    def __len__(self) -> int: ...

    def samples(self, length: int, tail: bool = False) -> SampleSource:
        """Packed sequences of `length` tokens; with `tail` nothing is left over at the end."""
        ...

    def shortage(self) -> str:
        """Why there may be no sample of some length."""
        ...

    def note(self, length: int) -> str | None:
        """What is worth knowing before it is trained on in sequences of `length` tokens."""
        ...


S = TypeVar("S", bound=Stream)


@dataclass(frozen=True)
class Splits(Generic[S]):
    """The two streams of one corpus. `validation` is empty when nothing is held out."""

    train: S
    validation: S
    stores: tuple[TokenStore, ...]
    """All documents of both, in their order."""
    left_out: tuple[Path, ...] = ()
    """Folders under `data.paths` in which something was passed over because training wrote it."""
    unknown: Mapping[str, int] = field(default_factory=dict)
    """Files of no known kind there: how many, by suffix."""


def open_splits(
    paths: Sequence[str | Path] = (),
    *,
    tokenizer: Tokenizer,
    validation_fraction: float,
    split: str = "documents",
    begins: bool | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
    run_folder: Path | None = None,
    decide: Decide = alone,
) -> Splits[TokenStream]:
    """The corpus under `paths` (none: the one that ships), tokenised and split.

    Text is tokenised once into `cache` (default ~/.cache/torchlinearmoe); `progress` is called with (documents, tokens)
    meanwhile. Folders of tokens under `paths` are used as they are, after the text; what a run writes into `run_folder`
    is no text. `decide` picks the process whose word counts. `begins`: whether documents start with the begin-of-text
    token; None: as in the folders of tokens, else where the tokenizer has one. `split`: whether `documents` are held
    out, or the last `tokens`. Raises UserError, one line, on unreadable paths, on tokens of another tokenizer, and when
    a split has no document.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"data.validation_fraction = {validation_fraction}: it must be at least 0 and below 1")
    folder = expanded(cache or DEFAULT_CACHE, "data.cache")
    stores, found = open_stores(
        lambda: find_sources(paths, run_folder),
        lambda files, made, starting: cached_store(files, read_documents, starting, folder, progress, folder=made),
        tokenizer,
        decide,
        begins,
    )
    if split == "tokens":
        whole = TokenStream(stores, [np.ones(store.num_documents, dtype=bool) for store in stores])
        cut = len(whole) - round(validation_fraction * len(whole))
        train, validation = whole.part(0, cut), whole.part(cut, len(whole))
        if min(len(train), len(validation) if validation_fraction else 2) < 2:
            raise UserError(
                f"data.validation_fraction = {validation_fraction} leaves {len(train)} tokens to train on and "
                f"{len(validation)} for validation; each needs 2"
            )
        return Splits(train, validation, tuple(stores), found.left_out, found.unknown)
    bound = int(validation_fraction * 2**64)
    held_out = [store.keys < bound for store in stores]
    train, validation = TokenStream(stores, [~mask for mask in held_out]), TokenStream(stores, held_out)
    splits = Splits(train, validation, tuple(stores), found.left_out, found.unknown)
    check_not_empty(splits, validation_fraction, ", or data.validation_split = 'tokens' to hold out its last tokens")
    return splits


def check_not_empty(splits: Splits, fraction: float, instead: str = "") -> None:
    """Raise UserError when there is nothing to train on, or nothing held out that should be; `instead` ends it."""
    total = splits.train.num_documents + splits.validation.num_documents
    counted = f"data.validation_fraction = {fraction} leaves no document (of {total})"
    if not splits.train.num_documents:
        raise UserError(f"{counted} to train on; lower it or add documents{instead}")
    if fraction and not splits.validation.num_documents:
        raise UserError(f"{counted} for validation; raise it, add documents, set 0 to go without validation{instead}")
