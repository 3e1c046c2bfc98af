"""What the tokens of a stream find before them: nothing, or a state.

A mixer hands its `Past` to the entries of `recurrence.py` and `tail.py` and says each of them once; they decide how it
is computed. A `Past` belongs to one call of one layer.

Shapes: T tokens, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

State = dict[str, Tensor]
"""Named state of one layer; dim 0 is the document (or the sequence being decoded)."""


@dataclass(frozen=True, eq=False)
class Empty:
    """Documents start with nothing before them; the only kind that enters compiled regions."""

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


Past = Empty | Resumed
