"""Documents packed whole into sequences: best-fit decreasing over windows of a stream.

    stream       ^ a b c d ^ e f ^ g h i ^ j ^ k l m n o p q        one window, sequences of 6 tokens
    documents    5, 3, 4, 2 tokens, and one of 8, longer than a sequence: its first 6 are a piece, its last 2 another
    sequences    ^ k l m n o | ^ a b c d . | ^ g h i ^ j | ^ e f p q .        `.` is padding

The longest piece comes first, and each goes where it leaves the least room ("best fit decreasing", Johnson 1973; for
pretraining Ding et al. 2024, "Fewer Truncations Improve Language Modeling"). Documents that are longer than a sequence
are cut every `length` tokens, all others are whole, and every label of the stream is in one sequence.

A window is a stretch of so many tokens that about WINDOW pieces begin in it, which are its own; whichever sequence is
asked for, only its window is packed. How many sequences each window has must be known before, or no sequence had a
number. Up to LOOKED_AT pieces all windows are packed for that when the stream is opened. Of more, windows spread evenly
over the stream tell it for their neighbours. Where one of those has too few for its documents, those left over are cut
to fit into the room that there is, and where it has too many, documents are spread over all.

The order goes through all windows, GROUP of them at a time in an order of the epoch's own, and shuffles their sequences
together, so that a window is packed once an epoch by whoever reads of it.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import OrderedDict
from typing import Any, NamedTuple, Protocol

import numpy as np

from torchlinearmoe.data.order import Permutation, mix_all
from torchlinearmoe.data.packing import IGNORED, Ids, Sample, ignored_sample

WINDOW = 1 << 13
"""Pieces of documents packed together, about; more where sequences are long."""
LEAST_SEQUENCES = 64
"""Of a window."""
LOOKED_AT = 1 << 20
"""Pieces up to which every window is packed when the data are opened."""
LEAST_LOOKED_AT = 16
"""Windows that are packed then, however many pieces they have."""
GROUP = 16
"""Windows whose sequences are shuffled together."""
KEPT = 1 << 26
"""Bytes of packed windows that are kept."""

GOES_ON, WHOLE, CUT = 0, 1, 2
"""What a piece is: one that goes on with a document, a whole document, or the first piece of one that is cut."""


class Bordered(Ids, Protocol):
    """A stream that knows where its documents begin."""

    num_documents: int
    ends_apart: bool
    """Whether the last id of a document is an end that predicts nothing."""

    def borders(self, start: int, stop: int) -> np.ndarray:
        """int64: where documents begin, from the last one at `start` or before it to the first at `stop` or after it;
        behind the last document, where one would begin."""
        ...


class Pieces(NamedTuple):
    """Stretches of documents, each of at most a sequence."""

    starts: np.ndarray
    """int64 [P]: places in the stream."""
    lengths: np.ndarray
    """int64 [P]: labels of each; it is the ids from its start on, and one more as the last label."""
    kinds: np.ndarray
    """int8 [P]"""


class Window(NamedTuple):
    """A packed window: sequence s holds the pieces firsts[s] .. firsts[s + 1] - 1."""

    pieces: Pieces
    firsts: np.ndarray
    """int64 [sequences + 1]"""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.firsts.nbytes + sum(array.nbytes for array in self.pieces)


def best_fit(lengths: np.ndarray, length: int) -> np.ndarray:
    """int64 [P]: the sequence, of `length` places, that each of P pieces of 1 .. `length` goes into; 0, 1, 2, ..."""
    order = np.argsort(-lengths, kind="stable")
    rooms: list[int] = []  # increasing
    owners: list[int] = []
    chosen: list[int] = []
    count = 0
    for places in lengths[order].tolist():
        found = bisect_left(rooms, places)
        if found == len(rooms):
            owner, room = count, length - places
            count += 1
        else:
            owner, room = owners.pop(found), rooms.pop(found) - places
        chosen.append(owner)
        if room:
            found = bisect_left(rooms, room)
            rooms.insert(found, room)
            owners.insert(found, owner)
    sequences = np.empty(len(lengths), dtype=np.int64)
    sequences[order] = chosen
    return sequences


def pack(pieces: Pieces, length: int, count: int | None = None) -> Window:
    """Pieces in sequences of `length` places: as many as best fit makes of them, or `count`, which have the room."""
    sequences = best_fit(pieces.lengths, length)
    made = int(sequences.max(initial=-1)) + 1
    count = made if count is None else count
    if made > count:
        pieces, sequences = _cut_to_fit(pieces, sequences, length, count)
    elif made < count:
        sequences = _spread(sequences, count)
    order = np.lexsort((pieces.starts, sequences))
    firsts = np.searchsorted(sequences[order], np.arange(count + 1))
    return Window(Pieces(*(array[order] for array in pieces)), firsts)


def _cut_to_fit(pieces: Pieces, sequences: np.ndarray, length: int, count: int) -> tuple[Pieces, np.ndarray]:
    """What is in the sequences from `count` on, cut into the room of those before."""
    kept = np.flatnonzero(sequences < count)
    rooms = length - np.bincount(sequences[kept], pieces.lengths[kept], minlength=count).astype(np.int64)
    targets = iter(np.argsort(-rooms, kind="stable").tolist())
    parts: list[tuple[int, int, int, int]] = []
    target = room = 0
    for index in np.flatnonzero(sequences >= count).tolist():
        start, left, kind = (int(array[index]) for array in pieces)
        while left:
            if not room:
                target = next(targets)
                room = int(rooms[target])
            taken = min(left, room)
            first = CUT if taken < left and kind == WHOLE else kind
            parts.append((start, taken, first, target))
            start, left, room, kind = start + taken, left - taken, room - taken, GOES_ON
    added = np.array(parts, dtype=np.int64).reshape(-1, 4).T
    joined = (np.concatenate([array[kept], more]).astype(array.dtype) for array, more in zip(pieces, added))
    return Pieces(*joined), np.concatenate([sequences[kept], added[3]])


def _spread(sequences: np.ndarray, count: int) -> np.ndarray:
    """The same with a piece in each of the sequences up to `count` that have none, while there is one to spare."""
    spread = sequences.copy()
    made = int(sequences.max(initial=-1)) + 1
    order = np.argsort(sequences, kind="stable")
    to_spare = order[1:][np.diff(sequences[order]) == 0][: count - made]
    spread[to_spare] = np.arange(made, made + len(to_spare))
    return spread


class BestFit:
    """The sequences of `length` tokens of a stream, window after window."""

    def __init__(self, stream: Bordered, length: int) -> None:
        self.stream, self.length = stream, length
        self._places = max(len(stream) - 1, 0)
        self._packed: OrderedDict[int, Window] = OrderedDict()
        self._kept = 0
        pieces = stream.num_documents + self._places / length
        sequences = max(int(WINDOW / max(pieces, 1) * self._places / length), LEAST_SEQUENCES)
        self._span = sequences * length
        windows = -(-self._places // self._span)
        most = max(int(LOOKED_AT / max(pieces, 1) * windows), LEAST_LOOKED_AT)
        self.exact = windows <= most
        """Whether all windows were packed; else their neighbours tell how many sequences the others have."""
        self.counts = np.zeros(windows, dtype=np.int64)
        """int64 [windows]: sequences of each."""
        self._looked_at = np.zeros(5, dtype=np.int64)
        bounds = (
            np.arange(windows + 1) if self.exact else np.append(np.arange(most + 1) * (windows - 1) // most, windows)
        )
        for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
            window = pack(self._pieces((low + high) // 2), length)
            made = len(window.firsts) - 1
            # A document may begin at a window's last place, so that its own need a sequence more than its span has.
            self.counts[low:high] = made if high - low == 1 else max(made, sequences + 1)
            if high - low == 1:
                self._keep(low, window)
            self._look_at((low + high) // 2, window, high - low)
        self._firsts = np.concatenate([[0], np.cumsum(self.counts)])

    def _look_at(self, index: int, window: Window, weight: int) -> None:
        """Count documents, those cut, and places, for what is told of the whole; `weight` windows are like this one."""
        kinds, begins = window.pieces.kinds, self._borders(index)
        inside = begins[:-1] >= index * self._span
        crossing = begins[:-1] // self.length != (begins[1:] - 1) // self.length
        counted = (
            (kinds != GOES_ON).sum(),
            (kinds == CUT).sum(),
            (inside & crossing).sum(),
            window.pieces.lengths.sum(),
            int(self.counts[index]) * self.length,
        )
        self._looked_at += weight * np.array(counted, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": OrderedDict(), "_kept": 0}

    def __getitem__(self, index: int) -> Sample:
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        window = self._window(number)
        within = index - int(self._firsts[number])
        chosen = slice(*window.firsts[within : within + 2].tolist())
        tokens = np.full(self.length, self.stream.padding, dtype=np.int64)
        labels = np.full(self.length, IGNORED, dtype=np.int64)
        starts, place = [], 0
        for start, count in zip(window.pieces.starts[chosen].tolist(), window.pieces.lengths[chosen].tolist()):
            ids = self.stream.read(start, start + count + 1)
            starts.append(place)
            tokens[place : place + count], labels[place : place + count] = ids[:-1], ids[1:]
            place += count
        if place < self.length:
            starts.append(place)
        kinds = window.pieces.kinds[chosen]
        return Sample(tokens, labels, starts, place, int((kinds != GOES_ON).sum()), int((kinds == CUT).sum()))

    def ignored(self) -> Sample:
        """A sample that counts for nothing."""
        return ignored_sample(self.length, self.stream.padding)

    def order(self, seed: int, first: int = 0, stream: tuple[int, ...] = ()) -> WindowOrder:
        """All of them, epoch after epoch."""
        return WindowOrder(self.counts, seed, first, stream)

    def note(self) -> str:
        """What becomes of documents."""
        documents, cut, cut_before, filled, places = self._looked_at.tolist()
        about = "" if self.exact else "about "
        return (
            f"data.packing = 'best_fit': {about}{cut / max(documents, 1):.2%} of documents are cut "
            f"('concatenate': {cut_before / max(documents, 1):.2%}), {about}{1 - filled / max(places, 1):.2%} of "
            f"{len(self)} sequences is padding"
        )

    def _borders(self, window: int) -> np.ndarray:
        start = window * self._span
        return self.stream.borders(start, min(start + self._span, self._places))

    def _pieces(self, window: int) -> Pieces:
        """The pieces that begin in a window."""
        length, start = self.length, window * self._span
        stop = min(start + self._span, self._places)
        borders = self._borders(window)
        begins, places = borders[:-1], np.diff(borders) - self.stream.ends_apart
        total = -(-places // length)
        low = np.maximum(-(-(start - begins) // length), 0)
        counts = np.maximum(np.minimum(-(-(stop - begins) // length), total) - low, 0)
        owner = np.repeat(np.arange(len(begins)), counts)
        number = low[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        kinds = np.where(number > 0, GOES_ON, np.where(total[owner] == 1, WHOLE, CUT)).astype(np.int8)
        return Pieces(begins[owner] + number * length, np.minimum(length, places[owner] - number * length), kinds)

    def _window(self, number: int) -> Window:
        if (window := self._packed.get(number)) is not None:
            self._packed.move_to_end(number)
            return window
        window = pack(self._pieces(number), self.length, int(self.counts[number]))
        self._keep(number, window)
        return window

    def _keep(self, number: int, window: Window) -> None:
        self._packed[number] = window
        self._kept += window.size
        while self._kept > KEPT and len(self._packed) > 1:
            self._kept -= self._packed.popitem(last=False)[1].size


class WindowOrder:
    """Global sample index -> sequence, epoch by epoch: a few windows at a time, their sequences shuffled together.

    counts: int64 [windows], the sequences of each window, which are numbered window after window. `first` and `stream`
    are those of `SampleOrder`.
    """

    def __init__(self, counts: np.ndarray, seed: int, first: int = 0, stream: tuple[int, ...] = ()) -> None:
        self._counts, self._firsts = counts, np.cumsum(counts) - counts
        self._total = int(counts.sum())
        self._seed, self._first, self._stream = seed, first, stream
        self._epoch, self._group = -1, -1

    def figures(self, stop: int) -> dict[str, float]:
        """Nothing to tell of one source."""
        return {}

    def _key(self, *more: int) -> tuple[int | str, ...]:
        return (self._seed, self._first, "windows", *self._stream, "epoch", *more)

    def _begin(self, epoch: int) -> None:
        """Lay the windows of an epoch in their order."""
        digest = hashlib.blake2b(repr(self._key(epoch)).encode(), digest_size=8).digest()
        mixed = mix_all(mix_all(np.arange(len(self._counts), dtype=np.uint64)) ^ np.frombuffer(digest, "<u8"))
        self._windows = np.argsort(mixed, kind="stable")
        self._ends = np.cumsum(self._counts[self._windows])
        self._epoch, self._group = epoch, -1

    def __getitem__(self, global_index: int) -> int:
        epoch, place = divmod(global_index - self._first, self._total)
        if epoch != self._epoch:
            self._begin(epoch)
        ends = self._ends
        group = int(np.searchsorted(ends[GROUP - 1 :: GROUP], place, side="right"))
        if group != self._group:
            self._begins = int(ends[group * GROUP - 1]) if group else 0
            size = int(ends[min((group + 1) * GROUP, len(ends)) - 1]) - self._begins
            self._permutation, self._group = Permutation(size, self._key(epoch, group)), group
        place = self._begins + self._permutation(place - self._begins)
        slot = int(np.searchsorted(ends, place, side="right"))
        window = self._windows[slot]
        return int(self._firsts[window]) + place - int(ends[slot] - self._counts[window])
