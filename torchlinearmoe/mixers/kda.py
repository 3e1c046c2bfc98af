"""Kimi Delta Attention: the delta rule with a forget gate per channel (Kimi Team 2025, arXiv 2510.26692).

    S'_t = diag(a_t) S_{t-1},      S_t = S'_t + b_t k_t (v_t - S'_t^T k_t)^T,      o_t = S_t^T q_t / sqrt(K)
    log a_t = -exp(A_log) softplus(W_2 W_1 x_t + dt_bias),      b_t = sigmoid(W_b x_t)  [times 2]
    y_t = W_o (RMSNorm(o_t) * sigmoid(G_2 G_1 x_t [+ bias]))

W_1 and G_1 have the rank of a value head's width; at full rank W_2 W_1 and G_2 G_1 are a matrix each (Ling 3.0). A
decay's logarithm may have a bound b below zero: log a_t = b sigmoid(exp(A_log) (W_2 W_1 x_t + dt_bias)). A_log, one a
value head, and dt_bias, one a key channel of a value head, stay in float32 in a module of their own; the rest is in
`delta_mixer.py`.

Shapes: T tokens, D width, HV value heads, K and V key and value width of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import Uniform, inverse_softplus_of_exp, linear, set_initializers
from torchlinearmoe.mixers.base import LayerPlace, register
from torchlinearmoe.mixers.delta_mixer import DeltaMixer, DeltaOptions
from torchlinearmoe.module import Module
from torchlinearmoe.recipe.schema import ModelRecipe


@dataclass(frozen=True, kw_only=True)
class Options(DeltaOptions):
    """`[mixer.kda]`."""

    decay_rank: int = 0
    """Rank of the decay's projection; 0 for a value head's width."""
    gate_rank: int = 0
    """Rank of the output gate's projection; 0 for a value head's width."""
    full_rank: bool = False
    """Make decays and gates by one matrix each."""
    decay_bound: float = 0.0
    """The lowest logarithm of a decay, which a sigmoid takes the place of the softplus to keep; 0 for none."""
    gate_activation: Literal["swish", "sigmoid"] = "sigmoid"
    """Activation of the output's gate."""
    gate_bias: bool = True
    """Add a bias to the output's gate; the released Kimi Linear has none."""


class ChannelDecay(Module):
    """log a = -exp(A_log) softplus(logits + dt_bias) in float32, one rate a head and one bias a channel.

    With a bound below zero: bound sigmoid(exp(A_log) (logits + dt_bias)).
    """

    keep_fp32 = True
    no_weight_decay = ("A_log", "dt_bias")

    def __init__(self, heads: int, width: int, bound: float = 0.0) -> None:
        super().__init__()
        self.width, self.bound = width, bound
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads * width))
        set_initializers(
            self,
            A_log=Uniform(1.0, 16.0, torch.log),
            dt_bias=Uniform(math.log(1e-3), math.log(1e-1), inverse_softplus_of_exp),
        )

    def forward(self, logits: Tensor) -> Tensor:
        """[T, HV K] -> log decays [T, HV, K], at most zero."""
        steps = (logits.to(self.A_log.dtype) + self.dt_bias).unflatten(-1, (-1, self.width))
        rates = self.A_log.exp().unsqueeze(-1)
        return self.bound * torch.sigmoid(rates * steps) if self.bound else -rates * F.softplus(steps)


@register("kda")
class KDA(DeltaMixer[Options]):
    """One decay a channel from a low-rank gate, float32 decay parameters; per-head norm with a low-rank sigmoid.

    At full rank its layers are `decay_proj` and `g_proj`.
    """

    Options = Options
    gate_kind = "channels"
    reads = {"q": ("q_proj",), "gate": ("gate_down", "gate_up")}
    writes = {**DeltaMixer.writes, "decay": ("decay_down", "decay_up")}
    variants = (
        {"conv": 0, "negative_eigenvalues": True},
        {"heads": 2, "head_dim": 16, "value_heads": 4, "expand_v": 1.5, "conv": 2},
        {"decay_rank": 3, "gate_rank": 5},
        {"output_norm": "none"},
        {"gate_activation": "swish"},
        {"gate_bias": False},
        {"full_rank": True, "decay_bound": -5.0},
    )

    def __init__(self, options: Options, model: ModelRecipe, place: LayerPlace) -> None:
        super().__init__(options, model, place)
        width, std = model.hidden_size, model.init_std
        decays, gates = self.value_heads * self.key_dim, self.value_heads * self.value_dim
        decay_rank, gate_rank = (rank or self.value_dim for rank in (options.decay_rank, options.gate_rank))
        if options.full_rank:
            self.reads, self.writes = {**self.reads, "gate": ("g_proj",)}, {**self.writes, "decay": ("decay_proj",)}
            self.decay_proj = linear(width, decays, std)
        else:
            self.decay_down = linear(width, decay_rank, std)
            self.decay_up = linear(decay_rank, decays, std)
        self.decay = ChannelDecay(self.value_heads, self.key_dim, options.decay_bound)
        if options.full_rank:
            self.g_proj = linear(width, gates, std, bias=options.gate_bias)
        else:
            self.gate_down = linear(width, gate_rank, std)
            self.gate_up = linear(gate_rank, gates, std, bias=options.gate_bias)
        self.norm = options.gated_norm(self.value_dim, model)

    @classmethod
    def check(cls, options: Options, model: ModelRecipe) -> None:
        super().check(options, model)
        for key in ("decay_rank", "gate_rank"):
            if options.full_rank and (rank := getattr(options, key)):
                raise RecipeError(f"mixer.{cls.name}.{key} = {rank}: there is none with full_rank = true; set it to 0")
        if options.decay_bound > 0:
            raise RecipeError(f"mixer.{cls.name}.decay_bound = {options.decay_bound}: must be below 0, or 0 for none")

    def tensor_parallel(self) -> dict[str, Placement]:
        layers = [name for chain in (self.reads["gate"], self.writes["decay"]) for name in chain]
        placements: dict[str, Placement] = {}
        for name in layers:
            placements[f"{name}.weight"] = Replicate() if name.endswith("_down") else Shard(0)
            if self.get_submodule(name).bias is not None:
                placements[f"{name}.bias"] = Shard(0)
        return super().tensor_parallel() | placements | {"decay.A_log": Shard(0), "decay.dt_bias": Shard(0)}
