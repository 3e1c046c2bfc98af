"""Delta rules by their gate."""

from torch import Tensor

KINDS = ("plain", "gated", "channels")
"""No gate, one per token and head (Gated DeltaNet), one per channel (KDA)."""


def delta_kind(log_decay: Tensor | None) -> str:
    """The kind of a delta rule; log_decay: None, [T, HV] or [T, HV, K]."""
    if log_decay is None:
        return "plain"
    return "gated" if log_decay.dim() == 2 else "channels"
