"""The optimizer step that does nothing when the gradients are broken, without asking the host.

A non-finite gradient anywhere makes the global norm non-finite, so the norm alone decides, the same on every rank.
"""

import torch
from torch.optim import Optimizer


def step_if_finite(optimizer: Optimizer, grad_norm: torch.Tensor) -> torch.Tensor:
    """Step unless `grad_norm` is NaN or infinite; return 1.0 if the step was skipped, else 0.0.

    grad_norm: 0-dim, from `clip_gradients`. Returns a 0-dim float32 tensor on its device. A skipped step leaves the
    parameters, both moments and the step counts as they were. With a fused optimizer the decision is taken on the
    device (the kernel reads the flag) and the host runs ahead; otherwise the host waits for the norm.
    """
    skipped = (~torch.isfinite(grad_norm)).to(torch.float32)
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = skipped  # type: ignore[attr-defined]  # where torch's fused optimizers look for it
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif not skipped.item():
        optimizer.step()
    return skipped
