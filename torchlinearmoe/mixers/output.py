"""The way out that several mixers share: a norm of each head's output, an activated gate, both by choice.

    y_t = W_o (RMSNorm(o_t) * activation(W_g x_t))

Without the norm, outputs of large states are as large as these are: Linear-MoE's `--la-output-norm identity`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.layers.norm import GatedHeadNorm, HeadGate, RMSNorm
from torchlinearmoe.mixers.base import MixerOptions
from torchlinearmoe.recipe.schema import ModelRecipe

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swish": F.silu, "sigmoid": torch.sigmoid}


@dataclass(frozen=True, kw_only=True)
class NormedOutput(MixerOptions):
    """Options of mixers with a norm before the output projection."""

    output_norm: Literal["rmsnorm", "none"] = "rmsnorm"
    """Norm of the output, before its gate where there is one."""

    def norm(self, width: int, model: ModelRecipe) -> nn.Module:
        """Of `width` channels."""
        return RMSNorm(width, model.norm_eps) if self.output_norm == "rmsnorm" else nn.Identity()


@dataclass(frozen=True, kw_only=True)
class GatedOutput(NormedOutput):
    """Options of mixers with a gate beside it."""

    gate_activation: Literal["swish", "sigmoid"] = "swish"
    """Activation of the output's gate."""

    def gated_norm(self, width: int, model: ModelRecipe, eps: float = 0.0) -> nn.Module:
        """Of heads of `width` channels, called with the outputs and the gate; an epsilon of 0 is the model's."""
        activation = ACTIVATIONS[self.gate_activation]
        if self.output_norm == "none":
            return HeadGate(activation)
        return GatedHeadNorm(width, eps or model.norm_eps, activation)


def check_epsilon(mixer: str, eps: float) -> None:
    """Raise RecipeError for an option `norm_eps` that is no epsilon; 0 is the model's."""
    if eps < 0:
        raise RecipeError(f"mixer.{mixer}.norm_eps = {eps}: must be positive, or 0 for model.norm_eps")
