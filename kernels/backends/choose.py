"""The choice of a backend: "auto", explicit names, and the record of what was chosen."""

import logging

import torch

from torchlinearmoe.kernels.backends import guards
from torchlinearmoe.kernels.backends.call import DELTA, LINEAR, Call

logger = logging.getLogger("torchlinearmoe.kernels")

NAMES = ("torch", "reference", "fla", "mamba_ssm", "triton")
PREFERENCE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*LINEAR, *DELTA, "dplr_rule", "slot_attention"), ("fla",)),
    **dict.fromkeys(("identity", "constant", "scalar"), ("fla", "triton")),
    "ssd": ("fla", "mamba_ssm", "triton"),
}
"""What "auto" tries before "torch", by operator; an operator that is not here runs on "torch"."""

_chosen: dict[str, tuple[str, str]] = {}


def chosen_backends() -> dict[str, tuple[str, str]]:
    """{operator: (backend, reason)} of every operator called so far, as chosen last."""
    return dict(sorted(_chosen.items()))


@torch.compiler.assume_constant_result
def choose(
    operator: str,
    requested: str,
    device: str,
    dtype: torch.dtype,
    channels: int,
    gradients: bool,
    compiling: bool = False,
) -> tuple[str, str]:
    """The backend for a call and an empty string, or any name and the one line that says why `requested` is refused.

    The arguments are the fields of `Call`, spelled out because torch.compile takes the answer for a constant of them,
    and `compiling`: inside torch.compile "auto" takes "torch", whose operations the compiler fuses with what is around
    them, where a package's kernels would break the graph at every layer.
    """
    call = Call(operator, device, dtype, channels, gradients)
    if requested == "auto" and compiling:
        name, reason = "torch", "torch.compile fuses it"
    elif requested == "auto":
        name, reason = _automatic(call)
    elif requested not in NAMES:
        return "", f"model.kernel_backend = {requested!r}: legal: {', '.join(('auto', *NAMES))}"
    else:
        name, reason = requested, "asked for"
        if name in guards.PACKAGES:
            refusal = guards.refusal(name, call, guards.this_machine(), auto=False)
            if refusal is not None:
                return "", f"model.kernel_backend = '{name}': cannot compute {operator}: {refusal}"
    if _chosen.get(operator) != (name, reason):
        _chosen[operator] = (name, reason)
        logger.info("%s runs on the %s backend: %s", operator, name, reason)
    return name, ""


def _automatic(call: Call) -> tuple[str, str]:
    refusals = []
    for name in PREFERENCE.get(call.operator, ()):
        refusal = guards.refusal(name, call, guards.this_machine(), auto=True)
        if refusal is None:
            return name, "; ".join(refusals) or "preferred"
        # The way out is for those who named the backend.
        refusals.append(f"not {name}: {refusal.rpartition('; ')[0]}")
    return "torch", "; ".join(refusals) or "the only one"
