"""Linear recurrences by their decay."""

from torch import Tensor

KINDS = ("identity", "constant", "scalar", "diagonal", "bonus")
"""No decay, a fixed number per head, one per token and head, one per channel, the same with RWKV6's bonus. A constant
decay that is learned, or whose final state is wanted, counts as a scalar one."""


def linear_kind(log_decay: Tensor | None, bonus: Tensor | None, want_final: bool) -> str:
    """The kind of a recurrence; log_decay: None, [H], [T, H] or [T, H, K]."""
    if log_decay is None:
        return "identity"
    if bonus is not None:
        return "bonus"
    if log_decay.dim() == 1:
        return "scalar" if want_final or log_decay.requires_grad else "constant"
    return "scalar" if log_decay.dim() == 2 else "diagonal"
