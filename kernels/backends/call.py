"""What is known about a call of an operator before anything is computed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable)

LINEAR = ("identity", "constant", "scalar", "diagonal", "bonus")
"""Linear recurrences by their decay: none, a fixed number per head, one per token and head, one per channel, the same
with RWKV6's bonus. A constant decay that is learned, or whose final state is wanted, counts as a scalar one."""
DELTA = ("delta", "gated_delta", "kda")
"""Delta rules by their gate: none, one per token and head, one per channel."""


@dataclass(frozen=True)
class States:
    """What a call says about states and documents, the same for every operator."""

    initial: Tensor | None
    want_final: bool
    cu_seqlens: Tensor | None
    document_ids: Tensor | None


@dataclass(frozen=True)
class Call:
    """The facts on which the choice of a backend rests."""

    operator: str
    """A name of `LINEAR`, `DELTA`, or the operator's own."""
    device: str
    """The type of the tensors' device."""
    dtype: torch.dtype
    """Of queries, keys and values."""
    channels: int
    """Of a head's queries and keys."""
    gradients: bool
    """Gradients are recorded."""


def linear_kind(log_decay: Tensor | None, bonus: Tensor | None, want_final: bool) -> str:
    """The name in `LINEAR` of a linear recurrence; log_decay: None, [H], [B, T, H] or [B, T, H, K]."""
    if log_decay is None:
        return "identity"
    if bonus is not None:
        return "bonus"
    if log_decay.dim() == 1:
        return "scalar" if want_final or log_decay.requires_grad else "constant"
    return "scalar" if log_decay.dim() == 3 else "diagonal"


def delta_kind(log_decay: Tensor | None) -> str:
    """The name in `DELTA` of a delta rule; log_decay: None, [B, T, HV] or [B, T, HV, K]."""
    if log_decay is None:
        return "delta"
    return "gated_delta" if log_decay.dim() == 3 else "kda"


def outside_graphs(function: Function) -> Function:
    """Keep torch.compile out of `function`: the caller's graph breaks there."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]
