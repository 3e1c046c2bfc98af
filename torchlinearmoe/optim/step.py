"""The optimizer step that clips, and does nothing when the gradients are broken, without asking the host.

A non-finite gradient anywhere makes the global norm non-finite, so the norm alone decides, the same on every rank.
"""

from __future__ import annotations

import torch

from torchlinearmoe.optim.adamw import AdamW


def step_if_finite(optimizer: AdamW, grad_norm: torch.Tensor, max_norm: float | None = None) -> torch.Tensor:
    """Step unless `grad_norm` is NaN or infinite; return 1.0 if the step was skipped, else 0.0.

    grad_norm: 0-dim, from `gradient_norm`. max_norm: gradients are scaled as if their norm were at most this; None or 0
    leaves them alone. Returns a 0-dim float32 tensor on its device. A skipped step leaves the parameters, both moments
    and the step counts as they were. On a GPU the decision is taken on the device and the host runs ahead.
    """
    skipped = (~torch.isfinite(grad_norm)).to(torch.float32)
    optimizer.update(clip_factor(grad_norm, max_norm), skipped)
    return skipped


def clip_factor(grad_norm: torch.Tensor, max_norm: float | None) -> torch.Tensor:
    """What gradients of this norm are multiplied by: 0-dim, at most 1."""
    if not max_norm:
        return torch.ones_like(grad_norm)
    return (max_norm / (grad_norm + 1e-6)).clamp(max=1.0)
