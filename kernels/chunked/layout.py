"""Rows of tokens cut into chunks, and what packed documents mean for a chunk.

Rows without packing start at a chunk border each (every row is padded by itself), so no chunk ever holds two of them
and no mask is needed. A packed row keeps its documents where they are. With chunks of 4:

    token     0 1 2 3 | 4 5 6 7 | 8 9
    document  0 0 0 1 | 1 1 1 1 | 2 2 (2 2)    the padding continues the last document, with zero keys
    carried   . . . . | x x x x | . .          tokens whose document came in from the chunk before
    last      . . . x | x x x x | x x          tokens of the document that the chunk ends with
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Documents:
    """The documents of a packed row as masks over its chunks."""

    same_MCC: Tensor
    """Token t (dim 1) may see token s (dim 2): same document and s <= t."""
    carried_MC: Tensor
    last_MC: Tensor
    keep_M: Tensor
    """The state that enters the chunk also leaves it: no border at its start or inside."""
    first_MC: Tensor
    """The position inside the chunk of the first token of the same document (read when states go in or out)."""
    final_MC: Tensor
    """The position inside the chunk of the last token of the same document."""


@dataclass(frozen=True)
class Edges:
    """Where the documents of a packed row start and end; needed only when states go in or out."""

    start_chunk_N: Tensor
    end_chunk_N: Tensor
    end_position_N: Tensor
    in_start_NC: Tensor
    """Tokens of the document inside the chunk that it starts in."""
    in_end_NC: Tensor
    """Tokens of the document inside the chunk that it ends in."""
    leaves_start_N: Tensor
    """The chunk in which the document starts also ends with it."""
    crosses_N: Tensor
    """The document ends in a later chunk than it starts in."""
    empty_N: Tensor


@dataclass(frozen=True)
class Layout:
    """How [B, T, ...] is cut into M chunks of C tokens a row."""

    B: int
    T: int
    M: int
    C: int
    with_states: bool
    """States go in or out."""
    documents: Documents | None
    """Only for packed rows."""
    edges: Edges | None
    """Only for packed rows with states."""

    @property
    def padded(self) -> bool:
        return self.M * self.C > self.T

    def split(self, x: Tensor) -> Tensor:
        """[B, T, H, ...] to contiguous [B, H, M, C, ...], zeros for the padding."""
        padding = self.M * self.C - self.T
        if padding:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding))
        return x.transpose(1, 2).contiguous().unflatten(2, (self.M, self.C))

    def join(self, x: Tensor) -> Tensor:
        """The inverse of `split`, the padding cut off."""
        return x.flatten(2, 3).transpose(1, 2)[:, : self.T]

    def output(self, scores: Tensor, u: Tensor, entered: Tensor, scale: float) -> Tensor:
        """scale * (scores u + entered), [B, H, M, C, V]."""
        o = torch.baddbmm(entered.flatten(0, 2), scores.flatten(0, 2), u.flatten(0, 2))
        return (o * scale).view(entered.shape)


def make_layout(
    batch: int,
    tokens: int,
    chunk_size: int,
    cu_seqlens: Tensor | None,
    document_ids: Tensor | None,
    with_states: bool,
) -> Layout:
    """Cut `batch` rows of `tokens` into chunks; chunks shrink (to a power of two) for rows shorter than one.

    With `document_ids` ([T], any labels that differ between documents) and no states, `cu_seqlens` is not read.
    """
    C = chunk_size
    while C > 1 and 2 * tokens <= C:
        C //= 2
    M = max(1, -(-tokens // C))
    documents = edges = None
    if cu_seqlens is not None or document_ids is not None:
        if document_ids is None:
            assert cu_seqlens is not None
            positions = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
            document_ids = torch.searchsorted(cu_seqlens, positions, right=True)
        documents = _documents(document_ids, M, C)
        if with_states:
            assert cu_seqlens is not None
            edges = _edges(cu_seqlens, M, C)
    return Layout(batch, tokens, M, C, with_states, documents, edges)


def _documents(ids_T: Tensor, M: int, C: int) -> Documents:
    padding = M * C - ids_T.shape[0]
    ids_MC = torch.cat([ids_T, ids_T[-1:].expand(padding)]).view(M, C)
    same_MCC = (ids_MC.unsqueeze(2) == ids_MC.unsqueeze(1)).tril()
    first_chunk = torch.zeros_like(ids_MC[:1], dtype=torch.bool)
    carried_MC = torch.cat([first_chunk, ids_MC[1:] == ids_MC[:-1, -1:]])
    last_MC = same_MCC[:, -1]
    # A token sees 1 + (position - first) tokens, and is seen by 1 + (final - position).
    positions = torch.arange(C, device=ids_T.device)
    return Documents(
        same_MCC=same_MCC,
        carried_MC=carried_MC,
        last_MC=last_MC,
        keep_M=carried_MC[:, -1],
        first_MC=positions + 1 - same_MCC.sum(2),
        final_MC=positions - 1 + same_MCC.sum(1),
    )


def _edges(cu_seqlens: Tensor, M: int, C: int) -> Edges:
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    empty = ends == starts
    start_chunk = (starts // C).clamp(max=M - 1)
    last = (ends - 1).clamp(min=0)
    end_chunk = last // C
    offsets = torch.arange(C, device=cu_seqlens.device)

    def within(chunk: Tensor) -> Tensor:
        tokens = chunk.unsqueeze(1) * C + offsets
        return (tokens >= starts.unsqueeze(1)) & (tokens < ends.unsqueeze(1))

    # The padding continues the last document that has tokens.
    reach = torch.where(ends == cu_seqlens[-1], ends.new_tensor(M * C), ends)
    return Edges(
        start_chunk_N=start_chunk,
        end_chunk_N=end_chunk,
        end_position_N=last % C,
        in_start_NC=within(start_chunk),
        in_end_NC=within(end_chunk),
        leaves_start_N=~empty & (reach >= (start_chunk + 1) * C),
        crosses_N=~empty & (end_chunk > start_chunk),
        empty_N=empty,
    )
