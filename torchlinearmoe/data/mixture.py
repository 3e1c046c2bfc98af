"""Several sources in given shares: which sample of which source comes when.

The pattern of a block of BLOCK samples is that of the weights: the k-th of a source's q samples in it lies at about
(k + 1/2) / q of the block, so every stretch of a run has the shares of the whole, within a sample or so a source.

    weights 3 : 1      a a b a | a a b a | a a b a ...
    sample of a        0 1   2   3 4   5   6 7   8          epoch after epoch of a, each shuffled by itself
    sample of b            0       1           2            likewise of b

The g-th sample of a run is a pure function of (seed, g, the sources' sizes and weights): longer runs begin as shorter
ones do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from torchlinearmoe.data.best_fit import BestFit
from torchlinearmoe.data.order import SampleOrder
from torchlinearmoe.data.packing import Order, Sample, Samples
from torchlinearmoe.data.splits import TokenStream
from torchlinearmoe.errors import UserError

BLOCK = 1 << 14
"""Samples of a pattern; shares are multiples of one over it."""


def quotas(weights: Sequence[float]) -> list[int]:
    """Samples of each source in a block, at least one, by largest remainders; weights need not add up to anything."""
    total = sum(weights)
    exact = [BLOCK * weight / total for weight in weights]
    counts = [max(int(share), 1) for share in exact]
    by_need = sorted(range(len(weights)), key=lambda i: (counts[i] - exact[i], i))
    for index in range(abs(BLOCK - sum(counts))):
        if sum(counts) < BLOCK:
            counts[by_need[index % len(counts)]] += 1
        else:
            counts[max(range(len(counts)), key=lambda i: counts[i] - exact[i] if counts[i] > 1 else -BLOCK)] -= 1
    return counts


class MixedOrder:
    """Global sample index -> sample of the mixture: sample i of source s has the number bases[s] + i.

    sizes: samples of each source. first: the global index at which the order begins. orders: of each source's samples;
    else each is shuffled as a whole, by itself.
    """

    def __init__(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        weights: Sequence[float],
        seed: int,
        first: int = 0,
        orders: Sequence[Order] | None = None,
    ) -> None:
        self._names, self._sizes, self._first = names, sizes, first
        self._bases = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        self._quotas = quotas(weights)
        self._orders = orders or [SampleOrder(size, seed, stream=(index, first)) for index, size in enumerate(sizes)]
        places = np.concatenate([(np.arange(count) + 0.5) / count for count in self._quotas])
        source = np.repeat(np.arange(len(sizes)), self._quotas)
        rank = np.concatenate([np.arange(count) for count in self._quotas])
        pattern = np.argsort(places, kind="stable")
        self._source, self._rank = source[pattern], rank[pattern]

    def __getitem__(self, global_index: int) -> int:
        block, place = divmod(global_index - self._first, BLOCK)
        source = int(self._source[place])
        here = block * self._quotas[source] + int(self._rank[place])
        return self._bases[source] + self._orders[source][here]

    def counts(self, stop: int) -> list[int]:
        """How many of the samples before the global index `stop` are of each source."""
        block, place = divmod(max(stop - self._first, 0), BLOCK)
        inside = np.bincount(self._source[:place], minlength=len(self._sizes)).tolist()
        return [block * quota + count for quota, count in zip(self._quotas, inside)]

    def figures(self, stop: int) -> dict[str, float]:
        """The share that each source has of the samples before `stop`, and how often it was gone through by then."""
        counts = self.counts(stop)
        total = max(sum(counts), 1)
        shares = {f"data/share/{name}": count / total for name, count in zip(self._names, counts)}
        epochs = {f"data/epochs/{name}": count / size for name, count, size in zip(self._names, counts, self._sizes)}
        return shares | epochs


class MixedSamples:
    """The samples of all sources, source after source."""

    def __init__(self, names: Sequence[str], parts: Sequence[Samples | BestFit], weights: Sequence[float]) -> None:
        self._names, self._parts, self._weights = names, parts, weights
        self._bases = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._bases[-1])

    def __getitem__(self, index: int) -> Sample:
        source = int(np.searchsorted(self._bases, index, side="right"))
        return self._parts[source][index - (int(self._bases[source - 1]) if source else 0)]

    def ignored(self) -> Sample:
        """A sample that counts for nothing."""
        return self._parts[0].ignored()

    def order(self, seed: int, first: int = 0, stream: tuple[int, ...] = ()) -> MixedOrder:
        """Which of them comes when."""
        orders = [part.order(seed, stream=(*stream, index, first)) for index, part in enumerate(self._parts)]
        return MixedOrder(self._names, [len(part) for part in self._parts], self._weights, seed, first, orders)


class MixedStream:
    """The training parts of several sources, each by its name."""

    def __init__(self, streams: Mapping[str, TokenStream], weights: Sequence[float]) -> None:
        self._names, self._streams, self._weights = list(streams), list(streams.values()), list(weights)
        self._starts = np.concatenate([[0], np.cumsum([len(stream) for stream in self._streams])])
        self.num_documents = sum(stream.num_documents for stream in self._streams)
        self.start, self.padding = self._streams[0].start, self._streams[0].padding

    def __len__(self) -> int:
        """Ids in all sources together."""
        return int(self._starts[-1])

    def samples(self, length: int, tail: bool = False) -> MixedSamples:
        """Sequences of `length` tokens, each of one source. Raises UserError for a source that has none."""
        parts = [stream.samples(length, tail) for stream in self._streams]
        for name, stream, part in zip(self._names, self._streams, parts):
            if not len(part):
                raise UserError(
                    f"training.sequence_length = {length}: the source '{name}' of data.sources has only {len(stream)} "
                    "tokens; shorten it or bring more text there"
                )
        return MixedSamples(self._names, parts, self._weights)

    def read(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: ids of the sources one after the other."""
        parts = [
            stream.read(max(start - int(begin), 0), min(stop - int(begin), len(stream)))
            for begin, stream in zip(self._starts, self._streams)
            if start < begin + len(stream) and stop > begin
        ]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def shortage(self) -> str:
        """Why there may be no sample of some length."""
        return f"the sources have only {len(self)} tokens; bring more text in data.sources"

    def note(self, length: int) -> str | None:
        """What each source brings."""
        counts = quotas(self._weights)
        told = [
            f"{name} {count / BLOCK:.1%} of {len(stream)} tokens"
            for name, count, stream in zip(self._names, counts, self._streams)
        ]
        notes = [(name, stream.note(length)) for name, stream in zip(self._names, self._streams)]
        return "; ".join([f"data.sources: {', '.join(told)}", *(f"{name}: {note}" for name, note in notes if note)])
