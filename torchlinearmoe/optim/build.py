"""From the `[optimizer]` section to a torch optimizer."""

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from torchlinearmoe.optim.groups import parameter_groups

OPTIMIZERS = ("adamw",)
"""Legal values of `optimizer.name`."""

_FUSED_DEVICES = {"cuda", "cpu"}


def build_optimizer(
    model: nn.Module,
    *,
    name: str = "adamw",
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    fused: bool | None = None,
) -> Optimizer:
    """The optimizer over the trainable parameters of `model`, plain tensors or DTensors on any mix of meshes.

    AdamW with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), decaying what `parameter_groups`
    says. `fused` None takes the one-kernel update where all parameters lie on a device that has one, else the
    multi-tensor update. Build it after the model is sharded: the moments take the layout of the parameters.
    `lr` is only the value until the first `set_learning_rate`.

    Raises ValueError for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer.name = {name!r}: must be one of {', '.join(OPTIMIZERS)}")
    groups = parameter_groups(model, weight_decay)
    if fused is None:
        fused = all(_can_fuse(parameter) for group in groups for parameter in group["params"])
    beta1, beta2 = betas
    return AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=0.0, fused=fused, foreach=not fused)


def _can_fuse(parameter: torch.Tensor) -> bool:
    return parameter.device.type in _FUSED_DEVICES and parameter.is_floating_point()
