"""The documents of a split as a stream of ids, and the stream cut into samples.

A stream is, document after document, the start marker and the document's tokens, and a last marker at the end:

    <|endoftext|> a b c <|endoftext|> d e <|endoftext|>

so that the target of a document's last token is the end of text. With a tokenizer that begins texts with a token of its
own, that one is the start marker, and every document has its end:

    <s> a b c </s> <s> d e </s>

Sample i of a stream is its ids i * L .. i * L + L: the first L are the inputs, the last L the labels, so every input
has the next id of the stream as its label. With L = 4 and `^` for the start marker, the end of text here:

    stream            ^ a b c ^ d e f g ^        two documents, "abc" and "defg"
    sample 0  inputs  ^ a b c                    labels  a b c ^
    sample 1  inputs  ^ d e f                    labels  d e f g
    sample 2  inputs  g . . .                    labels  ^ . . .      only where the tail is asked for
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np

from torchlinearmoe.data.packing import IGNORED, Sample, ignored_sample
from torchlinearmoe.data.store import TokenStore


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


class Samples:
    """The samples of `length` tokens of a stream, by number.

    A last, shorter piece of the stream is left out, or with `tail` filled up by ignored ids.
    """

    def __init__(self, stream: TokenStream, length: int, tail: bool = False) -> None:
        self.stream = stream
        self.length = length
        num_targets = max(len(stream) - 1, 0)
        self._len = -(-num_targets // length) if tail else num_targets // length

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index: int) -> Sample:
        start = index * self.length
        ids = self.stream.read(start, min(start + self.length + 1, len(self.stream)))
        num_targets = len(ids) - 1
        tokens = np.full(self.length, self.stream.padding, dtype=np.int64)
        labels = np.full(self.length, IGNORED, dtype=np.int64)
        tokens[:num_targets], labels[:num_targets] = ids[:-1], ids[1:]
        starts = [0, *(1 + np.flatnonzero(ids[1:-1] == self.stream.start)).tolist()]
        if num_targets == self.length:
            return Sample(tokens, labels, starts)
        return Sample(tokens, labels, [*starts, num_targets], num_targets)

    def ignored(self) -> Sample:
        """A sample that counts for nothing."""
        return ignored_sample(self.length, self.stream.padding)
