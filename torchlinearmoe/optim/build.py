"""From the `[optimizer]` section to an optimizer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from torchlinearmoe.optim.adamw import STATES, AdamW
from torchlinearmoe.optim.groups import parameter_groups

OPTIMIZERS = ("adamw",)
"""Legal values of `optimizer.name`."""


def build_optimizer(
    model: nn.Module | Sequence[nn.Module],
    *,
    name: str = "adamw",
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    states: str = "float32",
    seed: int = 0,
) -> AdamW:
    """The optimizer over the trainable parameters of a model or of its parts, plain or DTensors on any mix of meshes.

    AdamW, decaying what `parameter_groups` says, its moments in the type `states`; `seed` draws the roundings of
    moments in bfloat16. Build it after the model is sharded: the moments take the layout of the parameters. `lr` is
    only the value until the first `set_learning_rate`.

    Raises ValueError for an unknown name or type.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer.name = {name!r}: must be one of {', '.join(OPTIMIZERS)}")
    if states not in STATES:
        raise ValueError(f"optimizer.states = {states!r}: must be one of {', '.join(STATES)}")
    parts = [model] if isinstance(model, nn.Module) else list(model)
    names: dict[Tensor, str] = {parameter: name for part in parts for name, parameter in part.named_parameters()}
    groups = parameter_groups(nn.ModuleList(parts), weight_decay)
    return AdamW(groups, lr=lr, betas=betas, eps=eps, states=states, names=names, seed=seed)
