"""What softmax mixers share: attention over packed documents, and the cache of tokens that they keep while decoding.

Over spans of documents (context parallelism) there are two ways to see the tokens of earlier ranks:

    gather   every rank gathers keys and values of all (LASP-2H, arXiv 2502.07563, section 3.5) and attends with its own
             queries, causal from where its span begins; later ranks have more to do
    heads    an all-to-all trades spans of all heads for whole rows of some heads (arXiv 2309.14509), another trades the
             outputs back; all ranks have the same to do, and the key-value heads must divide

The cache has one entry a token, [B, room, ...] a part, written in place.

Letters: T tokens of this rank, W ranks, R rows, L tokens of a span, H query heads, G key-value heads, d head width; B
sequences decoded, M tokens of the longest context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinearmoe.documents import Documents
from torchlinearmoe.kernels.attention import packed_attention
from torchlinearmoe.mixers.base import Context, State
from torchlinearmoe.parallel.exchange.gather import all_to_all, finish_gather, start_gather
from torchlinearmoe.spans import Spans


def attend(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, *, scale: float, backend: str, window: int = 0
) -> Tensor:
    """Causal attention of documents that start empty, [T, H, d_v]; q: [T, H, d], k: [T, G, d], v: [T, G, d_v].

    Over the last `window` tokens where it is not 0.
    """
    spans = documents.spans
    if spans is None:
        return _whole(q, k, v, documents, scale, backend, window)
    if spans.by_heads(k.shape[1], window):
        q, k, v = _whole_rows((q, k, v), spans)
        return _own_spans(_whole(q, k, v, documents.whole, scale, backend, window), spans)
    k, v = with_history(torch.cat([k, v], -1), spans, window).split((k.shape[-1], v.shape[-1]), -1)
    return attend_to_history(q, k, v, documents, scale=scale, backend=backend, window=window)


def with_history(x: Tensor, spans: Spans, window: int = 0) -> Tensor:
    """x [T, ...] with, before each row's span, what earlier ranks have of the document that it begins with.

    [T + h_1 + ... + h_R, ...], row after row, h_r being `history` of the row. A window that reaches no further than
    the rank before takes the last window - 1 tokens of each span, whatever the spans' length.
    """
    if window == 1:
        return x
    rows, reach = x.unflatten(0, (spans.rows, spans.length)), window - 1
    near = spans.one_rank_back(window)
    gathered = finish_gather(start_gather(rows[:, -reach:] if near else rows, spans.group))
    parts: list[Tensor] = []
    for row, (whole, h) in enumerate(zip(gathered.unbind(1), history(spans, window))):
        if near:
            parts += [whole[max(spans.rank - 1, 0)][reach - h :], rows[row]]
        else:
            end = (spans.rank + 1) * spans.length
            parts.append(whole.flatten(0, 1)[end - spans.length - h : end])
    return torch.cat(parts)


def history(spans: Spans, window: int = 0) -> list[int]:
    """Tokens before each row's span that its first document reaches, at most window - 1 of them where it is not 0."""
    return [min(h, window - 1) if window else h for h in spans.history]


def attend_to_history(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, *, scale: float, backend: str, window: int = 0
) -> Tensor:
    """`attend` under context parallelism, k and v [T + h_1 + ... + h_R, G, ...] being the output of `with_history`."""
    assert documents.spans is not None
    before = tuple(history(documents.spans, window))
    return packed_attention(q, k, v, documents, scale=scale, window=window, history=before, backend=backend)


def _whole_rows(inputs: tuple[Tensor, ...], spans: Spans) -> list[Tensor]:
    """Spans of all heads, [T, H, d] each, to whole rows of this rank's share of the heads, [W T, H / W, d] each."""
    parts = [x.unflatten(1, (spans.size, -1)).movedim(1, 0) for x in inputs]  # [W, T, H / W, d]
    traded = all_to_all(torch.cat([part.flatten(2) for part in parts], -1), spans.group)
    rows = traded.unflatten(1, (spans.rows, spans.length)).transpose(0, 1).flatten(0, 2)
    pieces = rows.split([part.shape[2] * part.shape[3] for part in parts], -1)
    return [piece.unflatten(-1, part.shape[2:]) for piece, part in zip(pieces, parts)]


def _own_spans(o: Tensor, spans: Spans) -> Tensor:
    """The inverse for the outputs: [W T, H / W, d] -> [T, H, d]."""
    parts = o.unflatten(0, (spans.rows, spans.size, spans.length)).transpose(0, 1).flatten(1, 2)
    return all_to_all(parts, spans.group).transpose(0, 1).flatten(1, 2)


def _whole(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, backend: str, window: int) -> Tensor:
    return packed_attention(q, k, v, documents, scale=scale, window=window, backend=backend)


def append_to_cache(state: State, context: Context, **new: Tensor) -> list[Tensor]:
    """Write the new tokens' parts [T, ...] into the state, and read each back as [B, M, ...], in the given order."""
    ids = context.documents.ids.long()
    for name, part in new.items():
        state[name][ids, context.positions] = part.to(state[name].dtype)
    return [state[name][:, : context.history].to(part.dtype) for name, part in new.items()]


def padded_queries(q: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Packed queries [T, ...] as rows [B, L, ...] and their positions [B, L]; padding asks at position 0."""
    documents = context.documents
    ids, batch, longest = documents.ids.long(), len(documents.lengths), max(documents.lengths)
    rows = q.new_zeros(batch, longest, *q.shape[1:])
    positions = torch.zeros(batch, longest, dtype=torch.long, device=q.device)
    rows[ids, documents.positions] = q
    positions[ids, documents.positions] = context.positions
    return rows, positions
