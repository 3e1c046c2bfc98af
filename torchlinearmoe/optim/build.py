"""From the `[optimizer]` section to an optimizer, and which parameters it pulls towards zero.

Matrices and embeddings are, scales, offsets and decays are not. Weight decay makes sense for a parameter that enters a
matrix product. It does not for one whose zero has another meaning: a norm's scale, a bias, a recurrence's decay
(`A_log` at zero is a decay of 1/e, not "nothing"). A module with such a parameter of two or more dimensions names it in
`no_weight_decay` (`module.Module`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from torchlinearmoe.module import traits
from torchlinearmoe.optim.adamw import STATES, AdamW

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


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups holding every trainable parameter of `model` exactly once.

    Without decay: parameters of fewer than two dimensions (of the logical shape, for a DTensor), biases (`bias` or
    `*_bias`, whatever their shape) and those that a module lists in `no_weight_decay`. A parameter shared by several
    modules is exempt when one of them exempts it. Frozen parameters are left out, as is a group without members.
    """
    exempt = {id(parameter) for module in model.modules() for parameter in _exempt_parameters(module)}
    decayed, undecayed = [], []
    for parameter in model.parameters():  # yields a shared parameter once
        if parameter.requires_grad:
            (undecayed if id(parameter) in exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _exempt_parameters(module: nn.Module) -> list[nn.Parameter]:
    listed = traits(module).no_weight_decay
    return [
        *(
            parameter
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.dim() < 2 or name == "bias" or name.endswith("_bias")
        ),
        *(module.get_parameter(name) for name in listed),
    ]
