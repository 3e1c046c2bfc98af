"""Which parameters are pulled towards zero: matrices and embeddings are, scales, offsets and decays are not.

Weight decay makes sense for a parameter that enters a matrix product. It does not for one whose zero has another
meaning: a norm's scale, a bias, a recurrence's decay (`A_log` at zero is a decay of 1/e, not "nothing").
A module with such a parameter of two or more dimensions names it in `no_weight_decay` (`module.Module`).
"""

from typing import Any

from torch import nn

from torchlinearmoe.module import traits


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
