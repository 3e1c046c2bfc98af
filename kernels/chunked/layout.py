"""A stream of tokens cut into chunks, and what its documents mean for a chunk.

Documents stay where they are. With chunks of 4:

    token     0 1 2 3 | 4 5 6 7 | 8 9
    document  0 0 0 1 | 1 1 1 1 | 2 2 (2 2)    the padding continues the last document, with zero keys
    carried   . . . . | x x x x | . .          tokens whose document came in from the chunk before
    last      . . . x | x x x x | x x          tokens of the document that the chunk ends with
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlinearmoe.segments import Segments

CHUNK_SIZE = 64


@dataclass(frozen=True)
class Masks:
    """The documents of the stream as masks over its chunks."""

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
    """Where the documents start and end; needed only when states go in or out."""

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
    """How a stream of T tokens is cut into M chunks of C."""

    T: int
    M: int
    C: int
    documents: Masks
    edges: Edges | None
    """Only where states go in or out."""

    @property
    def padded(self) -> bool:
        return self.M * self.C > self.T

    def split(self, x: Tensor) -> Tensor:
        """[T, H, ...] to contiguous [1, H, M, C, ...], zeros for the padding."""
        padding = self.M * self.C - self.T
        if padding:
            x = F.pad(x, (0, 0) * (x.dim() - 1) + (0, padding))
        return x.transpose(0, 1).contiguous().unflatten(1, (self.M, self.C)).unsqueeze(0)

    def join(self, x: Tensor) -> Tensor:
        """The inverse of `split`, the padding cut off."""
        return x.squeeze(0).flatten(1, 2).transpose(0, 1)[: self.T]

    def output(self, scores: Tensor, u: Tensor, entered: Tensor, scale: float) -> Tensor:
        """scale * (scores u + entered), [1, H, M, C, V]."""
        o = torch.baddbmm(entered.flatten(0, 2), scores.flatten(0, 2), u.flatten(0, 2))
        return (o * scale).view(entered.shape)


def layout_of(segments: Segments, chunk_size: int, with_states: bool) -> Layout:
    """The chunks of a stream, made once a stream; they shrink (to a power of two) where it is shorter than one."""
    tokens, C = segments.tokens, chunk_size
    while C > 1 and 2 * tokens <= C:
        C //= 2
    M = max(1, -(-tokens // C))
    documents = segments.view(f"documents_{C}", lambda segments: _documents(segments.ids, M, C))
    edges = segments.view(f"edges_{C}", lambda segments: _edges(segments.borders, M, C)) if with_states else None
    return Layout(tokens, M, C, documents, edges)


@cache
def prepare(chunk_size: int) -> Callable[[Segments], Layout]:
    """What makes the masks of a stream ahead of a compiled region, for `Backend.prepare`."""
    return lambda segments: layout_of(segments, chunk_size, False)


def _documents(ids_T: Tensor, M: int, C: int) -> Masks:
    padding = M * C - ids_T.shape[0]
    ids_MC = torch.cat([ids_T, ids_T[-1:].expand(padding)]).view(M, C)
    same_MCC = (ids_MC.unsqueeze(2) == ids_MC.unsqueeze(1)).tril()
    first_chunk = torch.zeros_like(ids_MC[:1], dtype=torch.bool)
    carried_MC = torch.cat([first_chunk, ids_MC[1:] == ids_MC[:-1, -1:]])
    last_MC = same_MCC[:, -1]
    # A token sees 1 + (position - first) tokens, and is seen by 1 + (final - position).
    positions = torch.arange(C, device=ids_T.device)
    return Masks(
        same_MCC=same_MCC,
        carried_MC=carried_MC,
        last_MC=last_MC,
        keep_M=carried_MC[:, -1],
        first_MC=positions + 1 - same_MCC.sum(2),
        final_MC=positions - 1 + same_MCC.sum(1),
    )


def _edges(borders: Tensor, M: int, C: int) -> Edges:
    starts, ends = borders[:-1].long(), borders[1:].long()
    empty = ends == starts
    start_chunk = (starts // C).clamp(max=M - 1)
    last = (ends - 1).clamp(min=0)
    end_chunk = last // C
    offsets = torch.arange(C, device=borders.device)

    def within(chunk: Tensor) -> Tensor:
        tokens = chunk.unsqueeze(1) * C + offsets
        return (tokens >= starts.unsqueeze(1)) & (tokens < ends.unsqueeze(1))

    # The padding continues the last document that has tokens.
    reach = torch.where(ends == borders[-1], ends.new_tensor(M * C), ends)
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
