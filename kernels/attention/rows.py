"""Where queries and keys lie: rows of equal length, and before a row's keys those of earlier tokens.

two rows of 4, history (2, 0)      queries  a a b b | c c c d
                                   keys   a a a a b b | c c c d
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from torchlinearmoe.documents import Documents

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class QueryRows:
    """The T queries and their keys; the last keys of a document are its queries' own."""

    ids: Tensor
    """int [T]: the document of each query."""
    row_length: int
    """L; no document crosses a multiple of it."""
    history: tuple[int, ...]
    """Keys before each row's own, all of its first document."""
    borders: tuple[Tensor, Tensor]
    """int32 [N + 1] each: where the documents' queries and keys end."""
    lengths: tuple[list[int], list[int]]
    """The documents' queries and keys, on the host."""
    made: dict[Any, Any] = field(default_factory=dict)
    """What backends made of these rows, for the other layers."""

    @property
    def longest(self) -> tuple[int, int]:
        """Most queries and most keys of a document."""
        queries, keys = self.lengths
        return max(queries), max(keys)

    @property
    def plain_rows(self) -> bool:
        """Every row is one document that starts there."""
        return self.borders[0].shape[0] - 1 == len(self.history) and not any(self.history)


def query_rows(documents: Documents, history: tuple[int, ...] = ()) -> QueryRows:
    """Those of a stream whose rows go on from `history` keys each, made once for all layers that share it."""
    if any(history):
        return documents.segments.view(f"attention_{history}", lambda _: _continued(documents, history))
    return documents.segments.view("attention_rows", lambda _: _whole(documents))


def _whole(documents: Documents) -> QueryRows:
    borders, lengths = documents.cu_seqlens, [*documents.lengths]
    none = (0,) * documents.num_rows
    return QueryRows(documents.ids, documents.row_length, none, (borders, borders), (lengths, lengths))


def _continued(documents: Documents, history: tuple[int, ...]) -> QueryRows:
    # What follows a document's border may see its own tokens and, in a row's first document, the history.
    first = {row * documents.row_length: keys for row, keys in enumerate(history)}
    starts = accumulate(documents.lengths, initial=0)
    seen = [length + first.get(start, 0) for length, start in zip(documents.lengths, starts)]
    host = torch.tensor([0, *accumulate(seen)], dtype=torch.int32)
    host = host.pin_memory() if documents.ids.device.type == "cuda" else host
    borders = (documents.cu_seqlens, host.to(documents.ids.device, non_blocking=True))
    return QueryRows(documents.ids, documents.row_length, history, borders, ([*documents.lengths], seen))


def by_rows(attend: Attend, q: Tensor, k: Tensor, v: Tensor, rows: QueryRows) -> Tensor:
    """`attend(q, k, v, ids, key_ids)` over rows, all at once where none has a history, else one after the other.

    It is given q: [R, H, L, d], k: [R, G, M, d], v: [R, G, M, v], ids: [R, L] and key_ids: [R, M], the documents of
    queries and keys, of which the last L are the queries' own, and returns [R, H, L, v].
    """
    length = rows.row_length
    if not any(rows.history):
        q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
        ids = rows.ids.unflatten(0, (-1, length))
        return attend(q, k, v, ids, ids).transpose(1, 2).flatten(0, 1)
    keys = [length + earlier for earlier in rows.history]
    outputs = []
    for *qkv, ids, earlier in zip(q.split(length), k.split(keys), v.split(keys), rows.ids.split(length), rows.history):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in qkv)
        key_ids = torch.cat([ids[:1].expand(earlier), ids])
        outputs.append(attend(q, k, v, ids[None], key_ids[None]).squeeze(0).transpose(0, 1))
    return torch.cat(outputs)
