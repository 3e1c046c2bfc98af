"""Every backend by name."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from torchlinearmoe.kernels.backends import fla, fused, mamba_ssm, ours


@dataclass(frozen=True)
class Backend:
    """One way to compute the operators. Its functions take plain tensors, every default resolved; None where it has no
    form of an operator, which `choose` then never asks it for."""

    linear_recurrence: Callable[..., tuple[Tensor, Tensor | None]] | None = None
    """(q, k, v, log_decay, bonus, scale, states)"""
    delta_rule: Callable[..., tuple[Tensor, Tensor | None]] | None = None
    """(q, k, v, beta, log_decay, scale, states)"""
    dplr_rule: Callable[..., tuple[Tensor, Tensor | None]] | None = None
    """(q, k, v, a, b, log_decay, lower bound of the log decays or None, scale, states)"""
    slot_attention: Callable[..., tuple[Tensor, tuple[Tensor, Tensor] | None]] | None = None
    """(q, k, v, s, log_decay, scale, states of the slot keys, states of the slot values)"""
    quadratic_attention: Callable[..., tuple[Tensor, Tensor | None]] | None = None
    """(q, k, v, kind, scale, normalize, eps, states)"""
    ssd: Callable[..., tuple[Tensor, Tensor | None]] | None = None
    """(x, dt, A, B, C, states); without one, `linear_recurrence` computes it."""


BACKENDS: dict[str, Backend] = {
    "torch": Backend(
        linear_recurrence=ours.torch_linear,
        delta_rule=ours.torch_delta,
        dplr_rule=ours.torch_dplr,
        slot_attention=ours.torch_slots,
        quadratic_attention=ours.torch_quadratic,
    ),
    "reference": Backend(
        linear_recurrence=ours.reference_linear,
        delta_rule=ours.reference_delta,
        dplr_rule=ours.reference_dplr,
        slot_attention=ours.reference_slots,
        quadratic_attention=ours.reference_quadratic,
    ),
    "fla": Backend(
        linear_recurrence=fla.linear_recurrence,
        delta_rule=fla.delta_rule,
        dplr_rule=fla.dplr_rule,
        slot_attention=fla.slot_attention,
    ),
    "mamba_ssm": Backend(ssd=mamba_ssm.ssd),
    "triton": Backend(linear_recurrence=fused.linear_recurrence),
}
