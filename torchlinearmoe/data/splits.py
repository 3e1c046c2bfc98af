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

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from torchlinearmoe.data.best_fit import BestFit
from torchlinearmoe.data.cached import cached_texts
from torchlinearmoe.data.packing import Samples, SampleSource
from torchlinearmoe.data.prepare import Tell
from torchlinearmoe.data.prepared import messages_of
from torchlinearmoe.data.shared import Decide, alone, open_stores
from torchlinearmoe.data.sources import Sources, find_sources
from torchlinearmoe.data.store import TokenStore
from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.disk import expanded
from torchlinearmoe.errors import UserError

DEFAULT_CACHE = Path("~/.cache/torchlinearmoe")


Packing = Literal["concatenate", "best_fit"]
ALL_KEYS = (0, 1 << 64)
KEPT_RUNS = 1 << 26
"""Bytes of runs that a stream keeps."""


class TokenStream:
    """The documents of one split as one sequence of ids, read at any place.

    It knows where each store begins in it. Neighbouring documents of the split lie side by side on disk, so what a
    store has of it is runs of them, which are looked up when the store is read and kept while memory is left for them:
    run r is `tokens[sources[r] : ...]` of the store and fills the places from `starts[r]` on.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        keys: tuple[int, int] = ALL_KEYS,
        *,
        min_length: int = 0,
        packing: Packing = "concatenate",
    ) -> None:
        """The documents whose key lies in keys[0] .. keys[1] - 1 and that have `min_length` ids, in their order.

        packing: how samples are made of them, but for those that are asked for with a tail.
        """
        self._stores, self._keys, self._min_length, self._packing = list(stores), keys, min_length, packing
        self._best_fit: dict[int, BestFit] = {}
        self.left_out = 0
        """Documents with such a key that have fewer ids."""
        self.start, self.padding = stores[0].start, stores[0].padding
        self.ends_apart = stores[0].begin_of_text is not None
        """Whether the last id of a document is an end that predicts nothing."""
        self._last = [] if self.ends_apart else [stores[0].end_of_text]
        self._runs: OrderedDict[int, _Runs] = OrderedDict()
        self._kept = 0
        documents, tokens = zip(*map(self._count, range(len(stores))))
        self.num_documents = sum(documents)
        self._starts = np.concatenate([[0], np.cumsum(tokens)]).astype(np.int64)
        self._first, self._len = 0, int(self._starts[-1]) + len(self._last) if self.num_documents else 0

    def __len__(self) -> int:
        """Ids in the stream, the last marker included; 0 when no document belongs to it."""
        return self._len

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_runs": OrderedDict(), "_kept": 0}

    def _count(self, index: int) -> tuple[int, int]:
        """Documents and tokens that a store has of the stream."""
        store = self._stores[index]
        if self._keys == ALL_KEYS and not self._min_length:
            return store.num_documents, store.num_tokens
        if self._keys[0] == self._keys[1]:
            return 0, 0
        runs = self._runs_of(index)
        self.left_out += runs.left_out
        return runs.documents, int(runs.starts[-1])

    def _runs_of(self, index: int) -> _Runs:
        if (kept := self._runs.get(index)) is not None:
            self._runs.move_to_end(index)
            return kept
        store, (low, high) = self._stores[index], self._keys
        if self._keys == ALL_KEYS and not self._min_length:
            ends = np.array([0, store.num_tokens], dtype=np.int64)
            runs = _Runs(ends[:1], ends, store.num_documents)
        else:
            everyone = np.ones(store.num_documents, dtype=bool)
            keyed = everyone if self._keys == ALL_KEYS else (store.keys >= low) & (store.keys <= high - 1)
            mask = keyed & (np.diff(store.offsets) >= self._min_length) if self._min_length else keyed
            edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
            first, last = store.offsets[edges[::2]], store.offsets[edges[1::2]]
            starts, documents = np.concatenate([[0], np.cumsum(last - first)]).astype(np.int64), int(mask.sum())
            runs = _Runs(first, starts, documents, int(keyed.sum()) - documents)
        self._runs[index] = runs
        self._kept += runs.size
        while self._kept > KEPT_RUNS and len(self._runs) > 1:
            self._kept -= self._runs.popitem(last=False)[1].size
        return runs

    def part(self, start: int, stop: int) -> TokenStream:
        """The places start .. stop - 1 of a stream of all documents as a stream."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        part = copy(self)
        part._runs, part._kept, part._best_fit = OrderedDict(), 0, {}
        part._first, part._len = self._first + start, stop - start
        part.num_documents = self._begun_before(stop) - self._ended_before(start)
        return part

    def _begun_before(self, place: int) -> int:
        """Documents of a stream of all that begin before a place."""
        index = int(np.searchsorted(self._starts, place, side="left"))
        whole, rest = self._stores[: max(index - 1, 0)], self._stores[max(index - 1, 0) : index]
        inside = [int(np.searchsorted(s.offsets[:-1], place - self._starts[index - 1], side="left")) for s in rest]
        return sum(store.num_documents for store in whole) + sum(inside)

    def _ended_before(self, place: int) -> int:
        """Documents of a stream of all that end at a place or before it."""
        index = int(np.searchsorted(self._starts, place, side="right")) - 1
        rest = self._stores[index : index + 1]
        inside = [int(np.searchsorted(s.offsets[1:], place - self._starts[index], side="right")) for s in rest]
        return sum(store.num_documents for store in self._stores[:index]) + sum(inside)

    def samples(self, length: int, tail: bool = False) -> Samples | BestFit:
        """The stream packed in sequences of `length` tokens; with `tail` cut every so many, to the end of it."""
        if tail or self._packing == "concatenate":
            return Samples(self, length, tail)
        if length not in self._best_fit:
            self._best_fit[length] = BestFit(self, length)
        return self._best_fit[length]

    def shortage(self) -> str:
        """Why there may be no sample of some length."""
        return f"the training text has only {len(self)} tokens; shorten it or bring more text in data.paths"

    def note(self, length: int) -> str | None:
        """How many documents are too short, and what packing does to the others."""
        told = []
        if self._min_length:
            told.append(f"data.min_length = {self._min_length}: {self.left_out} shorter documents are left out")
        if isinstance(packed := self.samples(length), BestFit):
            told.append(packed.note())
        return "; ".join(told) or None

    def borders(self, start: int, stop: int) -> np.ndarray:
        """int64: where documents begin, from the last one at `start` or before it to the first at `stop` or after it;
        behind the last document, where one would begin."""
        assert 0 <= start < stop <= len(self), (start, stop, len(self))
        low, high = start + self._first, stop + self._first
        index, parts, begun = int(np.searchsorted(self._starts, low, side="right")) - 1, [], low
        while begun < high and index < len(self._stores):
            begin, end = int(self._starts[index]), int(self._starts[index + 1])
            if begin < end:
                inside = max(low - begin, 0), min(high, end) - begin
                found = begin + self._runs_of(index).borders(self._stores[index], *inside)
                parts.append(found[:-1])
                begun = int(found[-1])
            index += 1
        last = len(self) - len(self._last)
        return np.clip(np.concatenate([*parts, [begun]]) - self._first, 0, last)

    def read(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: the ids at places start .. stop - 1."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        start, stop = start + self._first, stop + self._first
        out = np.empty(stop - start, dtype=np.int64)
        place = start
        index = int(np.searchsorted(self._starts, start, side="right")) - 1
        while place < stop:
            if index == len(self._stores):
                out[place - start :] = self._last
                break
            begin, end = int(self._starts[index]), min(stop, int(self._starts[index + 1]))
            if place < end:
                self._runs_of(index).read(self._stores[index], place - begin, out[place - start : end - start])
            place, index = end, index + 1
        return out


class _Runs(NamedTuple):
    """What a store has of a stream."""

    sources: np.ndarray
    """int64 [runs]: where each begins in the store."""
    starts: np.ndarray
    """int64 [runs + 1]: where each begins in what the store has of the stream, and where the last ends."""
    documents: int
    left_out: int = 0
    """Documents of the stream's split that are too short."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.sources.nbytes + self.starts.nbytes

    def borders(self, store: TokenStore, start: int, stop: int) -> np.ndarray:
        """int64: where documents begin in what the store has, from the last at `start` or before it to the first at
        `stop` or after it; behind the last, where it ends."""
        first, last = (int(np.searchsorted(self.starts, place, side="right")) - 1 for place in (start, stop - 1))
        begin = int(self.sources[first]) + start - int(self.starts[first])
        end = int(self.sources[last]) + stop - int(self.starts[last])
        found = store.borders(begin, end)
        runs = np.searchsorted(self.sources[first : last + 1], found, side="right") - 1 + first
        runs[0], runs[-1] = first, last  # the last one is where the document before it ends, perhaps with its run
        places = self.starts[runs] + found - self.sources[runs]
        inside = places < self.starts[runs + 1]
        inside[-1] = True
        return places[inside]

    def read(self, store: TokenStore, place: int, out: np.ndarray) -> None:
        """Fill `out` with the ids from `place` on."""
        run = int(np.searchsorted(self.starts, place, side="right")) - 1
        filled = 0
        while filled < len(out):
            count = min(len(out) - filled, int(self.starts[run + 1]) - place)
            source = int(self.sources[run]) + place - int(self.starts[run])
            out[filled : filled + count] = store.read(source, source + count)
            place, filled, run = place + count, filled + count, run + 1


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
    others: Mapping[str, Stream] = field(default_factory=dict)
    """What is validated on besides, by name."""
    left_out: tuple[Path, ...] = ()
    """Folders under `data.paths` in which something was passed over because training wrote it."""
    unknown: Mapping[str, int] = field(default_factory=dict)
    """Files of no known kind there: how many, by suffix."""
    made_of: str = ""
    """What documents that are not stored are a function of."""

    @property
    def begin_of_text(self) -> int | None:
        """The token that documents start with where it is not the end of text."""
        return self.stores[0].begin_of_text if self.stores else None


def open_splits(
    paths: Sequence[str | Path] = (),
    *,
    tokenizer: Tokenizer,
    validation_fraction: float,
    split: str = "documents",
    min_length: int = 0,
    packing: Packing = "concatenate",
    begins: bool | None = None,
    cache: str | Path | None = None,
    text_key: str = "text",
    tell: Tell | None = None,
    run_folder: Path | None = None,
    decide: Decide = alone,
) -> Splits[TokenStream]:
    """The corpus under `paths` (none: the one that ships), tokenised and split.

    Text is tokenised once into `cache` (default ~/.cache/torchlinearmoe), by all cores where there is much of it;
    `tell` is called with (done, total) in bytes meanwhile. `text_key`: where JSON and parquet have the text. Folders of
    tokens under `paths` are used as they are, after the text; what a run writes into `run_folder` is no text. `decide`
    picks the process whose word counts. `begins`: whether documents start with the begin-of-text token; None: as in
    the folders of tokens, else where the tokenizer has one. `split`: whether `documents` are held out, or the last
    `tokens`. Raises UserError, one line, on unreadable paths, on tokens of another tokenizer, and when a split has no
    document.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"data.validation_fraction = {validation_fraction}: it must be at least 0 and below 1")
    folder = expanded(cache or DEFAULT_CACHE, "data.cache")

    def find() -> Sources:
        found = find_sources(paths, run_folder)
        for tokens in found.stores:
            if messages_of(tokens) is not None:
                raise UserError(f"data.paths: '{tokens}' holds messages; set data.format = 'messages'")
        return found

    stores, found = open_stores(
        find,
        lambda files, made, starting: cached_texts(files, starting, folder, made, text_key=text_key, tell=tell),
        tokenizer,
        decide,
        begins,
    )
    if split == "tokens":
        whole = TokenStream(stores, packing=packing)
        cut = len(whole) - round(validation_fraction * len(whole))
        train, validation = whole.part(0, cut), whole.part(cut, len(whole))
        if min(len(train), len(validation) if validation_fraction else 2) < 2:
            raise UserError(
                f"data.validation_fraction = {validation_fraction} leaves {len(train)} tokens to train on and "
                f"{len(validation)} for validation; each needs 2"
            )
        return Splits(train, validation, tuple(stores), left_out=found.left_out, unknown=found.unknown)
    bound = int(validation_fraction * 2**64)
    how: dict[str, Any] = {"min_length": min_length, "packing": packing}
    train, validation = TokenStream(stores, (bound, 1 << 64), **how), TokenStream(stores, (0, bound), **how)
    check_long_enough([train, validation], min_length)
    splits = Splits(train, validation, tuple(stores), left_out=found.left_out, unknown=found.unknown)
    check_not_empty(splits, validation_fraction, ", or data.validation_split = 'tokens' to hold out its last tokens")
    return splits


def check_long_enough(streams: Sequence[S], min_length: int) -> None:
    """Raise UserError where no document of the streams together has `min_length` ids."""
    if min_length and not sum(stream.num_documents for stream in streams):
        raise UserError(
            f"data.min_length = {min_length}: no document has so many tokens; lower it, or bring longer text"
        )


def check_not_empty(splits: Splits, fraction: float, instead: str = "") -> None:
    """Raise UserError when there is nothing to train on, or nothing held out that should be; `instead` ends it."""
    total = splits.train.num_documents + splits.validation.num_documents
    counted = f"data.validation_fraction = {fraction} leaves no document (of {total})"
    if not splits.train.num_documents:
        raise UserError(f"{counted} to train on; lower it or add documents{instead}")
    if fraction and not splits.validation.num_documents:
        raise UserError(f"{counted} for validation; raise it, add documents, set 0 to go without validation{instead}")
