"""Gated DeltaNet: the delta rule with a forget gate (Yang et al. 2024, arXiv 2412.06464).

    S'_t = a_t S_{t-1},      S_t = S'_t + b_t k_t (v_t - S'_t^T k_t)^T,      o_t = S_t^T q_t / sqrt(K)
    log a_t = -exp(A_log) softplus(W_a x_t + dt_bias),      b_t = sigmoid(W_b x_t)  [times 2]
    y_t = W_o (RMSNorm(o_t) * swish(W_g x_t))

A_log and dt_bias, one a value head, stay in float32 in a module of their own; the rest is in `delta_mixer.py`.

Shapes: T tokens, D width, HV value heads, V value width of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Shard

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import Uniform, inverse_softplus_of_exp, linear, set_initializers
from torchlinearmoe.mixers.base import LayerPlace, register
from torchlinearmoe.mixers.delta_mixer import DeltaMixer, DeltaOptions
from torchlinearmoe.mixers.output import check_epsilon
from torchlinearmoe.module import Module
from torchlinearmoe.recipe.schema import ModelRecipe


@dataclass(frozen=True, kw_only=True)
class Options(DeltaOptions):
    """`[mixer.gated_delta_net]`."""

    expand_v: float = 2.0
    """Width of a value head as a multiple of the key head's."""
    norm_eps: float = 0.0
    """Epsilon of the output's norm; 0 for the model's."""


class HeadDecay(Module):
    """log a = -exp(A_log) softplus(logits + dt_bias) in float32, one rate and one bias a head (Mamba2's gate)."""

    keep_fp32 = True
    no_weight_decay = ("A_log", "dt_bias")

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        set_initializers(
            self,
            A_log=Uniform(1e-4, 16.0, torch.log),
            dt_bias=Uniform(math.log(1e-3), math.log(1e-1), inverse_softplus_of_exp),
        )

    def forward(self, logits: Tensor) -> Tensor:
        """[T, HV] -> log decays [T, HV], at most zero."""
        wide = logits.to(self.A_log.dtype)
        return -self.A_log.exp() * F.softplus(wide + self.dt_bias)


@register("gated_delta_net")
class GatedDeltaNet(DeltaMixer[Options]):
    """One decay a head, float32 decay parameters; gated per-head norm."""

    Options = Options
    gate_kind = "gated"
    writes = {**DeltaMixer.writes, "decay": ("a_proj",)}
    variants = (
        {"conv": 0, "expand_v": 1.0},
        {"negative_eigenvalues": True, "expand_v": 1.0},
        {"heads": 2, "head_dim": 16, "value_heads": 4, "expand_v": 1.5},
        {"output_norm": "none", "gate_activation": "sigmoid"},
        {"norm_eps": 1e-2},
    )

    def __init__(self, options: Options, model: ModelRecipe, place: LayerPlace) -> None:
        super().__init__(options, model, place)
        width, std = model.hidden_size, model.init_std
        self.g_proj = linear(width, self.value_heads * self.value_dim, std)
        self.a_proj = linear(width, self.value_heads, std)
        self.decay = HeadDecay(self.value_heads)
        self.norm = options.gated_norm(self.value_dim, model, options.norm_eps)

    @classmethod
    def check(cls, options: Options, model: ModelRecipe) -> None:
        super().check(options, model)
        check_epsilon(cls.name, options.norm_eps)
        if options.norm_eps and options.output_norm == "none":
            raise RecipeError(
                f"mixer.{cls.name}.norm_eps = {options.norm_eps}: there is no norm with output_norm = 'none'; "
                "set it to 0"
            )

    def tensor_parallel(self) -> dict[str, Placement]:
        own = {"g_proj.weight": Shard(0), "a_proj.weight": Shard(0)}
        return super().tensor_parallel() | own | {"decay.A_log": Shard(0), "decay.dt_bias": Shard(0)}
