"""Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): what was said of this key?

A document lists pairs of a key and a value, then asks for every key once, in any order; the label of an asked key is
its value. It can be answered only from what the model keeps of the pairs, so accuracy tells what a state of some size
holds.

    tokens   7 91  3 60  . . 3 . 7 . . .       2 pairs in 12 tokens; `.` is any id, or 0
    labels   - -   - -   - - 60 - 91 - - -

Questions stand at even places after the pairs; the gap before one follows a power law, with which most are asked early,
as the gaps between repetitions do in text. Document n of an entry is a function of (seed, entry, n).

    packed sequence   [ document | document | ... ]     all of one entry, each by itself
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from torchlinearmoe.data.order import SampleOrder
from torchlinearmoe.data.packing import IGNORED, Order, Sample, ignored_sample
from torchlinearmoe.data.splits import Splits
from torchlinearmoe.recipe.schema import DataRecipe, RecallRecipe

POWER = 0.01
"""Gap g has probability in proportion to g^(POWER - 1)."""
TRAINED, HELD_OUT = 0, 1


@dataclass(frozen=True)
class Recall:
    """How documents are drawn."""

    vocabulary: int
    """Ids: 1 .. vocabulary / 2 - 1 are keys, what follows values."""
    fill: str
    """`random` or `zero`."""
    seed: int

    def draw(self, entry: RecallRecipe, number: int, split: int = TRAINED) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels of a document, int64 [length] each; IGNORED where nothing is asked."""
        pairs, length = entry.pairs, entry.length
        chance = np.random.default_rng([self.seed, split, pairs, length, number])
        half = self.vocabulary // 2
        keys = 1 + chance.choice(half - 1, pairs, replace=False)
        values = half + chance.choice(self.vocabulary - half, pairs, replace=False)
        space = (length - 2 * pairs) // 2
        # The largest sums of log-probability and Gumbel noise are draws without replacement, the largest one first.
        noisy = (POWER - 1) * np.log(np.arange(1, space + 1)) + chance.gumbel(size=space)
        asked = 2 * pairs + 2 * np.argsort(-noisy)[:pairs]
        if self.fill == "random":
            tokens = chance.integers(self.vocabulary, size=length)
        else:
            tokens = np.zeros(length, dtype=np.int64)
        labels = np.full(length, IGNORED, dtype=np.int64)
        tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
        tokens[asked], labels[asked] = keys, values
        return tokens, labels


class RecallStream:
    """The documents of one split."""

    def __init__(self, recall: Recall, entries: Sequence[RecallRecipe], counts: Sequence[int], split: int) -> None:
        """`counts`: documents of each entry."""
        self.recall, self.entries, self.counts, self.split = recall, list(entries), list(counts), split
        self.num_documents = sum(counts)

    def __len__(self) -> int:
        """Tokens in all."""
        return sum(count * entry.length for entry, count in zip(self.entries, self.counts))

    def samples(self, length: int, tail: bool = False) -> RecallSamples:
        """Packed sequences of `length` tokens; with `tail` the last of an entry may hold fewer documents."""
        return RecallSamples(self, length, tail)

    def shortage(self) -> str:
        """Why there may be no sample of some length."""
        return "data.recall has not the examples that fill a sequence; raise its examples"

    def note(self, length: int) -> str | None:
        """What is asked."""
        told = [f"{n} of {e.pairs} pairs in {e.length} tokens" for e, n in zip(self.entries, self.counts)]
        return f"data.recall: {', '.join(told)}"


class RecallSamples:
    """Sequences of `length` tokens, those of the first entry first."""

    def __init__(self, stream: RecallStream, length: int, tail: bool) -> None:
        self.stream, self.length = stream, length
        self._rooms = [length // entry.length for entry in stream.entries]
        rows = [-(-n // room) if tail else n // room for n, room in zip(stream.counts, self._rooms)]
        self._starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        self._tail = tail

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        entry, room = self.stream.entries[which], self._rooms[which]
        first = (index - int(self._starts[which])) * room
        last = min(first + room, self.stream.counts[which])
        sample, place, starts = self.ignored(), 0, []
        for number in range(first, last):
            end = place + entry.length
            drawn = self.stream.recall.draw(entry, number, self.stream.split)
            sample.tokens[place:end], sample.labels[place:end] = drawn
            starts.append(place)
            place = end
        if place < self.length:
            starts.append(place)
        return Sample(sample.tokens, sample.labels, starts, place if self._tail else None)

    def ignored(self) -> Sample:
        """A sample that counts for nothing."""
        return ignored_sample(self.length, 0)

    def order(self, seed: int, first: int = 0, stream: tuple[int, ...] = ()) -> Order:
        """All of them, epoch after epoch."""
        return SampleOrder(len(self), seed, first, stream)


def open_recall(data: DataRecipe) -> Splits[RecallStream]:
    """The documents that `[data]` describes. Held out are as many as `validation_fraction` says, drawn besides."""
    recall = Recall(data.recall_vocabulary, data.recall_fill, data.recall_seed)
    counts = [entry.examples for entry in data.recall]
    held_out = [math.ceil(n * data.validation_fraction) for n in counts]
    return Splits(
        RecallStream(recall, data.recall, counts, TRAINED),
        RecallStream(recall, data.recall, held_out, HELD_OUT),
        (),
        made_of=json.dumps([asdict(recall), *map(asdict, data.recall)]),
    )
