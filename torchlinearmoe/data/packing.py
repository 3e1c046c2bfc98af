"""A stream of tokens cut into samples, and samples into micro-batches.

Sample i of a stream is its ids i * L .. i * L + L: the first L are the inputs, the last L the labels, so every input
has the next id of the stream as its label. With L = 4 and `^` for the start marker, the end of text here:

    stream            ^ a b c ^ d e f g ^        two documents, "abc" and "defg"
    sample 0  inputs  ^ a b c                    labels  a b c ^
    sample 1  inputs  ^ d e f                    labels  d e f g
    sample 2  inputs  g . . .                    labels  ^ . . .      only where the tail is asked for

Within a sample a document starts at the sample's first token and at every marker. What a sample cuts off goes on in the
next one as a document of its own: its positions and states start afresh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from torchlinearmoe.data.order import SampleOrder
from torchlinearmoe.documents import Documents
from torchlinearmoe.kernels.cross_entropy import IGNORED


@dataclass(frozen=True, eq=False)
class Sample:
    """One packed sequence of L tokens."""

    tokens: np.ndarray
    """int64 [L]"""
    labels: np.ndarray
    """int64 [L], IGNORED where there is nothing to predict."""
    starts: list[int]
    """Where its documents start; the first is 0."""
    filled: int | None = None
    """Tokens that come from the data, what follows is padding; None: all, in every sample of its kind."""
    begun: int = 0
    """Documents that begin in it."""
    cut: int = 0
    """Of these, the ones that another sample goes on with."""


class SampleSource(Protocol):
    """Samples of one length, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def ignored(self) -> Sample:
        """A sample that counts for nothing."""
        ...

    def order(self, seed: int, first: int = 0, stream: tuple[int, ...] = ()) -> Order:
        """Which of them comes when; the order begins at the global index `first`, and those of different `stream`s
        are unlike."""
        ...


class Order(Protocol):
    """Global sample index -> sample."""

    def __getitem__(self, global_index: int) -> int: ...

    def figures(self, stop: int) -> dict[str, float]:
        """What is worth logging of the samples before the global index `stop`."""
        ...


class Ids(Protocol):
    """What samples read of a stream."""

    start: int
    """The id that starts a document."""
    padding: int
    """The id that fills up."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: the ids at places start .. stop - 1."""
        ...


class Samples:
    """The samples of `length` tokens of a stream, by number.

    A last, shorter piece of the stream is left out, or with `tail` filled up by ignored ids.
    """

    def __init__(self, stream: Ids, length: int, tail: bool = False) -> None:
        self.stream = stream
        self.length = length
        self._tail = tail
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
        goes_on = int(ids[0] != self.stream.start)
        begun = len(starts) - goes_on
        cut = int(begun > 0 and ids[-1] != self.stream.start)
        if num_targets < self.length:
            starts.append(num_targets)
        # Where one may have padding all say how far they are filled, or compiled regions would exist with and without.
        return Sample(tokens, labels, starts, num_targets if self._tail else None, begun, cut)

    def ignored(self) -> Sample:
        """A sample that counts for nothing."""
        return ignored_sample(self.length, self.stream.padding)

    def order(self, seed: int, first: int = 0, stream: tuple[int, ...] = ()) -> Order:
        """All of them, epoch after epoch."""
        return SampleOrder(len(self), seed, first, stream)


def ignored_sample(length: int, padding: int) -> Sample:
    """One document of `padding` without labels."""
    tokens = np.full(length, padding, dtype=np.int64)
    return Sample(tokens, np.full(length, IGNORED, dtype=np.int64), [0], 0)


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Some samples as one flat stream of T tokens: what goes through one forward of a data rank."""

    tokens: Tensor
    """int64 [T]"""
    labels: Tensor
    """int64 [T]: the next token, or IGNORED."""
    cu_seqlens: list[int]
    """The borders of its documents on the host, 0 .. T."""
    row_length: int
    """Tokens of one sample; T is a multiple of it."""
    valid_tokens: int
    """Labels that are not IGNORED, counted on the host."""
    filled: tuple[int, ...] | None = None
    """Tokens of each sample before its padding; None where no sample has any."""
    begun: int = 0
    """Documents that begin in its samples."""
    cut: int = 0
    """Of these, the ones that another sample goes on with."""

    @property
    def num_sequences(self) -> int:
        """Samples in it."""
        return self.tokens.shape[0] // self.row_length

    @property
    def counted_tokens(self) -> int:
        """Tokens that are no padding."""
        return self.tokens.shape[0] if self.filled is None else sum(self.filled)

    def documents(self, device: torch.device | str = "cpu") -> Documents:
        """Its documents, with their borders on `device`."""
        return Documents.packed(self.cu_seqlens, self.row_length, device, filled=self.filled)

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same with tokens and labels on `device`; from pinned memory the copy does not wait."""
        return replace(
            self, tokens=self.tokens.to(device, non_blocking=True), labels=self.labels.to(device, non_blocking=True)
        )

    def pin_memory(self) -> MicroBatch:
        """The same with tokens and labels in page-locked memory. The loader calls this."""
        return replace(self, tokens=self.tokens.pin_memory(), labels=self.labels.pin_memory())


def collate(samples: Sequence[Sample]) -> MicroBatch:
    """Samples of one length, flattened one after the other."""
    length = len(samples[0].tokens)
    tokens = np.concatenate([sample.tokens for sample in samples])
    labels = np.concatenate([sample.labels for sample in samples])
    filled = tuple(length if sample.filled is None else sample.filled for sample in samples)
    borders = [row * length + start for row, sample in enumerate(samples) for start in sample.starts]
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        cu_seqlens=[*borders, len(tokens)],
        row_length=length,
        valid_tokens=int((labels != IGNORED).sum()),
        filled=None if all(sample.filled is None for sample in samples) else filled,
        begun=sum(sample.begun for sample in samples),
        cut=sum(sample.cut for sample in samples),
    )
