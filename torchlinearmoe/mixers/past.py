"""What the tokens of a stream find before them: nothing, a state, or other ranks' tokens.

A mixer hands its `Past` to the entries of `recurrence.py` and `tail.py` and says each of them once; they decide how it
is computed. A `Past` belongs to one call of one layer.

Shapes: T tokens, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from torchlinearmoe.parallel.spans import Spans

State = dict[str, Tensor]
"""Named state of one layer; dim 0 is the document (or the sequence being decoded)."""


@dataclass(frozen=True, eq=False)
class Empty:
    """Documents start with nothing before them."""

    ids: Tensor
    """int [T]: the document of each token."""
    after: ClassVar[None] = None


@dataclass(frozen=True, eq=False)
class Resumed:
    """Documents go on from `state`, one entry each."""

    ids: Tensor
    """int [T]: the document of each token."""
    cu_seqlens: Tensor
    """int32 [N + 1]: where documents start."""
    state: State
    stepping: bool = False
    """Every document is one token."""
    after: State = field(default_factory=dict)
    """The state after each document's last token; every entry adds its parts."""


@dataclass(frozen=True, eq=False)
class Spanned:
    """Documents start empty, but may have started on an earlier rank: context parallelism."""

    ids: Tensor
    """int [T]: the document of each token, among this rank's."""
    cu_seqlens: Tensor
    """int32 [N + 1]: where this rank's pieces of documents start."""
    spans: Spans
    after: ClassVar[None] = None

    def first_states(self, state_R: Tensor) -> Tensor:
        """[R, ...], what enters the spans of R rows -> [N, ...], for all documents; the others start with zeros."""
        documents = self.cu_seqlens.shape[0] - 1
        return state_R.new_zeros(documents, *state_R.shape[1:]).index_copy(0, self.spans.first_R, state_R)


Past = Empty | Resumed | Spanned
