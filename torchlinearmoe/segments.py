"""Where documents end, as kernels read it: tensors, and views of them that are made once.

A mixer sees `Documents`; what it hands to an operator is their `Segments`, the same borders without the host's
bookkeeping. Segments may have no tokens, so that their number can be a bound that does not change from batch to batch,
and their lengths need not be known on the host: a routed stream learns them on the device.

    ids         0 0 0 2 2 | 3 3 3        T = 8, N = 6
    borders     0 3 3 5 8 8 8            segments 1, 4 and 5 are empty

Whatever a kernel wants besides (masks over chunks, a table of chunks, padded rows) is a view: it is made when the first
layer asks, and found by all others. Inside a compiled region a view that is there is an input of the graph; one that is
not is computed in the graph and not kept.

Letters: T tokens of the stream, N segments.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TypeVar

import torch
from torch import Tensor

V = TypeVar("V")


class Segments:
    """The N segments of a stream of T tokens, one after the other."""

    def __init__(
        self, ids: Tensor, borders: Tensor, lengths: tuple[int, ...] | None = None, *, single: bool = False
    ) -> None:
        self.ids = ids
        """int [T]: the segment of each token, never falling."""
        self.borders = borders
        """int32 [N + 1]: segment n is the tokens borders[n] .. borders[n + 1] - 1."""
        self.lengths = lengths
        """The tokens of each on the host, where they are known there."""
        self.single = single
        """Every segment is one token: decoding."""
        self._views = SimpleNamespace()

    @classmethod
    def of_lengths(cls, lengths: tuple[int, ...], device: torch.device | str = "cpu") -> Segments:
        """Segments of `lengths` tokens each."""
        host = torch.tensor((0, *lengths), dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)
        borders = (host.pin_memory() if torch.device(device).type == "cuda" else host).to(device, non_blocking=True)
        numbers = torch.arange(len(lengths), dtype=torch.int32, device=device)
        ids = torch.repeat_interleave(numbers, borders.diff(), output_size=sum(lengths))
        return cls(ids, borders, lengths, single=bool(lengths) and set(lengths) == {1})

    @classmethod
    def of_ids(cls, ids: Tensor, count: int) -> Segments:
        """`count` segments, some of them perhaps empty, whose lengths only the device knows; ids: int32 [T]."""
        numbers = torch.arange(count + 1, dtype=ids.dtype, device=ids.device)
        return cls(ids, torch.searchsorted(ids, numbers).to(torch.int32))

    @property
    def tokens(self) -> int:
        """T."""
        return self.ids.shape[0]

    @property
    def count(self) -> int:
        """N."""
        return self.borders.shape[0] - 1

    def to(self, device: torch.device | str) -> Segments:
        """The same on another device, without views."""
        return Segments(self.ids.to(device), self.borders.to(device), self.lengths, single=self.single)

    def host_lengths(self) -> tuple[int, ...]:
        """`lengths`, waiting for the device where it alone knows them."""
        if self.lengths is None:
            self.lengths = tuple(self.borders.diff().tolist())
        return self.lengths

    def view(self, name: str, make: Callable[[Segments], V]) -> V:
        """What `make` makes of these segments, once for all who ask for `name`: a Python identifier, or the compiler
        stops."""
        found = getattr(self._views, name, None)
        if found is None:
            found = make(self)
            if not torch.compiler.is_compiling():
                setattr(self._views, name, found)
        return found


def bound_on_documents(tokens: int, documents: int) -> int:
    """A number of segments that seldom changes: one for every 256 tokens, doubled until the documents fit."""
    bound = max(16, tokens // 256)
    while bound < documents:
        bound *= 2
    return bound
