"""Where one document of a packed token stream ends and the next begins.

Everything that mixes tokens (recurrent state, short convolution, token shift, attention) stops at a document's
border, so the borders travel beside the hidden states as one `Documents`. A plain batch is the case of equal lengths.

Letters: B batch, T tokens of the flat stream, N documents.

    stream      a b c | d e | f g h        T = 8, N = 3, row_length = 8
    cu_seqlens  0       3     5       8
    ids         0 0 0   1 1   2 2 2
    positions   0 1 2   0 1   0 1 2

A row may end in padding, positions that hold no text: routers leave them out. They are real tokens to everything else,
documents of their own that nothing is predicted from.

    stream      a b c . | d e f g        row_length = 4, filled = (3, 4)
    counted     1 1 1 0   1 1 1 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from torchlinearmoe.late import to_device
from torchlinearmoe.segments import Segments, bound_on_documents
from torchlinearmoe.spans import Spans


@dataclass(frozen=True, eq=False)
class Documents:
    """The borders of the N documents of one flat stream of T tokens, on the device and on the host."""

    cu_seqlens: Tensor
    """int32 [N + 1] on the device: document n is the tokens cu_seqlens[n] .. cu_seqlens[n + 1] - 1."""
    ids: Tensor
    """int32 [T] on the device: the document of each token, 0, 0, 0, 1, 1, ..."""
    positions: Tensor
    """int64 [T] on the device: the place of each token in its document."""
    lengths: tuple[int, ...]
    """Tokens of each document, on the host; all at least 1."""
    row_length: int
    """Tokens of one packed sequence; the stream is T / row_length of them, and no document crosses into the next."""
    spans: Spans | None = None
    """Under context parallelism: how the documents go on over the ranks. A row is this rank's span of it then."""
    filled: tuple[int, ...] | None = None
    """Tokens of each row that count, on the host; what follows them in the row is padding. None: all count."""
    apart: bool = False
    """Each document is a sequence of its own, a prompt of a batch perhaps, and no part of a packed one."""

    @property
    def num_documents(self) -> int:
        """N."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.ids.shape[0]

    @property
    def whole_positions(self) -> Tensor:
        """int64 [T]: the place of each token in its document, counted from its very first one, on whatever rank."""
        return self.positions if self.spans is None else self.spans.positions

    @cached_property
    def whole(self) -> Documents:
        """The documents of the whole rows, of which this rank has spans; this where it has all."""
        if self.spans is None:
            return self
        row_length = self.spans.size * self.spans.length
        return Documents.packed(self.spans.whole_borders, row_length, self.ids.device)

    @property
    def num_rows(self) -> int:
        """Packed sequences in the stream."""
        return self.num_tokens // self.row_length

    @cached_property
    def counted(self) -> Tensor | None:
        """bool [T] on the device: False for padding; None where all tokens count."""
        if self.filled is None:
            return None
        filled_R1 = to_device(torch.tensor(self.filled, device="cpu").unsqueeze(1), self.ids.device)
        return (torch.arange(self.row_length, device=self.ids.device) < filled_R1).flatten()

    @cached_property
    def sequence_ids(self) -> Tensor:
        """int64 [T] on the device: the sequence of each token; a row, or a document where they stand apart."""
        if self.apart:
            return self.ids.long()
        return torch.arange(self.num_tokens, device=self.ids.device) // self.row_length

    def count_sequences(self, part: int = 0, parts: int = 1) -> list[int]:
        """Counting tokens of each sequence in number `part` of `parts` equal pieces of the stream, on the host."""
        lengths = self.lengths if self.apart else self.filled or (self.row_length,) * self.num_rows
        starts = accumulate(self.lengths, initial=0) if self.apart else range(0, self.num_tokens, self.row_length)
        begin, end = (self.num_tokens // parts * n for n in (part, part + 1))
        return [max(0, min(end, start + length) - max(begin, start)) for start, length in zip(starts, lengths)]

    @property
    def max_length(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    @cached_property
    def segments(self) -> Segments:
        """What kernels read of documents that have states: N segments."""
        return Segments(self.ids, self.cu_seqlens, self.lengths, single=set(self.lengths) == {1})

    @cached_property
    def bounded(self) -> Segments:
        """What kernels read of documents without states: as many segments as the bound says, so that no shape tells
        their number; those after the Nth have no tokens."""
        more = bound_on_documents(self.num_tokens, self.num_documents) - self.num_documents
        borders = torch.cat([self.cu_seqlens, self.cu_seqlens[-1:].expand(more)])
        return Segments(self.ids, borders, (*self.lengths, *(0,) * more))

    @classmethod
    def packed(
        cls,
        cu_seqlens: Sequence[int],
        row_length: int | None = None,
        device: torch.device | str = "cpu",
        spans: Spans | None = None,
        filled: Sequence[int] | None = None,
    ) -> Documents:
        """Documents from their borders on the host, `[0, ..., T]`, strictly increasing.

        `row_length` defaults to T, one packed sequence. Only the N + 1 borders are copied to the device; the copy
        does not wait for it. Raises ValueError on borders that do not increase from 0, on a T that is not whole
        rows, on a document that crosses a row, and on a `filled` that does not fit the rows.
        """
        borders = [int(border) for border in cu_seqlens]
        if len(borders) < 2 or borders[0] != 0:
            raise ValueError(f"cu_seqlens = {_short(borders)}: it must start at 0 and name at least one document")
        lengths = tuple(end - start for start, end in pairwise(borders))
        if min(lengths) < 1:
            raise ValueError(f"cu_seqlens = {_short(borders)}: it must strictly increase (a document has no tokens)")
        num_tokens = borders[-1]
        row_length = num_tokens if row_length is None else row_length
        if row_length < 1 or num_tokens % row_length:
            raise ValueError(f"row_length = {row_length}: it must divide the {num_tokens} tokens of the stream")
        missing = set(range(0, num_tokens, row_length)).difference(borders)
        if missing:
            raise ValueError(
                f"cu_seqlens = {_short(borders)}: a document crosses token {min(missing)}, "
                f"where a row of row_length = {row_length} tokens begins"
            )
        rows = num_tokens // row_length
        if filled is not None and (len(filled) != rows or min(filled) < 0 or max(filled) > row_length):
            raise ValueError(f"filled = {_short(list(filled))}: needs {rows} numbers from 0 to {row_length}")
        built = cls._build(borders, lengths, row_length, torch.device(device))
        return replace(built, spans=spans, filled=None if filled is None else tuple(filled))

    @classmethod
    def prompts(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Documents:
        """Sequences of unequal lengths, one after the other. Raises ValueError where one has no tokens."""
        return replace(cls.packed([0, *accumulate(lengths)], device=device), apart=True)

    @classmethod
    def batch(cls, batch_size: int, length: int, device: torch.device | str = "cpu") -> Documents:
        """A plain batch: `batch_size` documents of `length` tokens, one a row."""
        if batch_size < 1 or length < 1:
            raise ValueError(f"a batch of shape [{batch_size}, {length}] has no tokens")
        borders = list(range(0, batch_size * length + 1, length))
        return cls._build(borders, (length,) * batch_size, length, torch.device(device))

    @classmethod
    def _build(cls, borders: list[int], lengths: tuple[int, ...], row_length: int, device: torch.device) -> Documents:
        host = torch.tensor(borders, dtype=torch.int32, device="cpu")
        if device.type == "cuda":
            host = host.pin_memory()
        cu_seqlens = host.to(device, non_blocking=True)
        num_tokens = borders[-1]
        document = torch.arange(len(lengths), dtype=torch.int32, device=device)
        # output_size spares repeat_interleave a wait for the device.
        ids = torch.repeat_interleave(document, cu_seqlens.diff(), output_size=num_tokens)
        starts = torch.repeat_interleave(cu_seqlens[:-1].long(), cu_seqlens.diff(), output_size=num_tokens)
        positions = torch.arange(num_tokens, dtype=torch.int64, device=device) - starts
        return cls(cu_seqlens, ids, positions, lengths, row_length)


def _short(borders: list[int]) -> str:
    if len(borders) <= 6:
        return str(borders)
    head, tail = ", ".join(map(str, borders[:4])), ", ".join(map(str, borders[-2:]))
    return f"[{head}, ..., {tail}]"
