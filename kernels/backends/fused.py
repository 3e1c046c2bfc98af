"""Our Triton kernels behind `ops.linear_recurrence`; they are imported when the first call comes."""

import importlib

from torch import Tensor

from torchlinearmoe.kernels.backends.call import States


def linear_recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, bonus: Tensor | None, scale: float, states: States
) -> tuple[Tensor, Tensor | None]:
    """`reference.linear.linear_recurrence` for log_decay None, [H] or [B, T, H], and no bonus; `states` fp32."""
    assert bonus is None
    fused = importlib.import_module("torchlinearmoe.kernels.fused.scalar")
    return fused.linear_recurrence(q, k, v, log_decay, scale, states)
