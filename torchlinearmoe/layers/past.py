"""What the tokens of a stream find before them: nothing, a state, or other ranks' tokens.

A mixer hands its `Past` to convolutions, token shifts and recurrences and says each of them once, with the part of the
state that goes in; they decide how it is computed, and give back the part that comes out. A `Past` belongs to one call
of one layer.

Shapes: T tokens, N documents.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from torchlinearmoe.segments import Segments
from torchlinearmoe.spans import Spans

State = dict[str, Tensor]
"""Named state of one layer; dim 0 is the document (or the sequence being decoded)."""
After = dict[str, Tensor | None]
"""The state after the last token of each document, by name: tensors, or None where none went in."""


def complete(after: After) -> State:
    """The state that comes out where one went in."""
    return {name: part for name, part in after.items() if part is not None}


@dataclass(frozen=True, eq=False)
class Empty:
    """Documents start with nothing before them."""

    segments: Segments
    state: ClassVar[State] = {}


@dataclass(frozen=True, eq=False)
class Resumed:
    """Documents go on from `state`, one entry each."""

    segments: Segments
    state: State


@dataclass(frozen=True, eq=False)
class Spanned:
    """Documents start empty, but may have started on an earlier rank: context parallelism."""

    segments: Segments
    """This rank's pieces of documents."""
    spans: Spans
    state: ClassVar[State] = {}

    def first_states(self, state_R: Tensor) -> Tensor:
        """[R, ...], what enters the spans of R rows -> [N, ...], for all documents; the others start with zeros."""
        zeros = state_R.new_zeros(self.segments.count, *state_R.shape[1:])
        return zeros.index_copy(0, self.spans.first_R, state_R)


Past = Empty | Resumed | Spanned


class Carry(enum.Enum):
    """How a part of the state passes from one span of tokens to the next."""

    RECURRENT = "S_out = A S_in + B"
    LAST_TOKENS = "the last n inputs of the document"
    APPEND = "one entry a token"


@dataclass(frozen=True)
class StateSpec:
    """One named part of a layer's state."""

    shape: tuple[int, ...]
    """Shape of one document's entry; for APPEND the shape of one token's entry."""
    carry: Carry
    fp32: bool = True
    """Kept in float32 (else in the compute type)."""
