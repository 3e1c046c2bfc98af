"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635).

    S_t = diag(a_t) S_{t-1} + k_t v_t^T,      o_t = S_t^T q_t / sqrt(K)
    log a_t = log sigmoid(W_2 W_1 x_t + b) / 16,      W_1 of rank 16
    y_t = W_o (RMSNorm(o_t) * swish(W_g x_t))

Log decays are computed in float32 from the gate's logits. W_1, W_2 and b are ordinary weights nevertheless: rounding a
logit to bfloat16 changes log a_t by about the rounding of the input itself, and the division by 16 shrinks it once
more; nothing is exponentiated twice as with A_log.

Shapes: T tokens, D width, H query heads, G key-value heads (each read by H / G neighbouring query heads), K and V key
and value width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import Placement, Replicate, Shard

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import linear
from torchlinearmoe.kernels.choose import KernelCall
from torchlinearmoe.kernels.linear import OPERATOR, linear_recurrence_flops
from torchlinearmoe.kernels.operator import Call
from torchlinearmoe.layers.convolution import Convolutions
from torchlinearmoe.layers.past import After, Past
from torchlinearmoe.mixers.base import (
    Carry,
    LayerPlace,
    StateSpec,
    expanded,
    geometry,
    register,
)
from torchlinearmoe.mixers.feature_maps import ELEMENTWISE
from torchlinearmoe.mixers.linear_mixer import LinearMixer, Parts
from torchlinearmoe.mixers.output import GatedOutput
from torchlinearmoe.mixers.recurrence import linear_recurrence
from torchlinearmoe.precision import in_float32
from torchlinearmoe.recipe.schema import ModelRecipe


@dataclass(frozen=True, kw_only=True)
class Options(GatedOutput):
    """`[mixer.gla]`."""

    kv_heads: int = 0
    """Heads of k, v and the gate, a divisor of the query heads; 0 for as many."""
    expand_k: float = 0.5
    """Key width as a multiple of a head's width."""
    expand_v: float = 1.0
    """Value width as a multiple of a head's width."""
    gate_rank: int = 16
    """Rank of the gate's projection."""
    gate_normalizer: float = 16.0
    """Divisor of the log decays; larger ones remember longer."""
    clamp_min: float | None = None
    """The lowest log decay, below zero; none by default."""
    feature_map: Literal["elu", "relu", "silu", "identity"] = "identity"
    """Map of q and k; `elu` is elu(x) + 1."""
    conv: int = 0
    """Taps of a short convolution with SiLU on q, k and v; 0 for none."""


def _dims(options: Options, model: ModelRecipe) -> tuple[int, int, int, int]:
    """(query heads, key-value heads, key width, value width)."""
    heads, width = geometry(options, model)
    return heads, options.kv_heads or heads, expanded(width, options.expand_k), expanded(width, options.expand_v)


@register("gla")
class GLA(LinearMixer[Options]):
    """Diagonal decay from a low-rank gate; gated per-head norm."""

    Options = Options
    variants = (
        {"heads": 4, "head_dim": 16, "kv_heads": 2, "conv": 4},
        {"expand_k": 1.0, "expand_v": 1.5, "clamp_min": -0.1, "gate_rank": 3, "gate_normalizer": 8.0},
        {"feature_map": "silu", "heads": 3, "head_dim": 16, "kv_heads": 1},
        {"output_norm": "none", "gate_activation": "sigmoid"},
    )
    float8 = ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj")
    reads = {"q": ("q_proj",), "gate": ("g_proj",)}
    writes = {"k": ("k_proj",), "v": ("v_proj",), "decay": ("decay_down", "decay_up")}

    def __init__(self, options: Options, model: ModelRecipe, place: LayerPlace) -> None:
        super().__init__(options, model, place)
        self.heads, self.kv_heads, self.key_dim, self.value_dim = _dims(options, model)
        self.normalizer = options.gate_normalizer
        self.clamp_min = options.clamp_min
        self.phi = ELEMENTWISE[options.feature_map]
        self.backend = model.kernel_backend
        self.scale = self.key_dim**-0.5
        width, std = model.hidden_size, model.init_std
        queries, keys = self.heads * self.key_dim, self.kv_heads * self.key_dim
        values, outputs = self.kv_heads * self.value_dim, self.heads * self.value_dim
        self.q_proj = linear(width, queries, std)
        self.k_proj = linear(width, keys, std)
        self.v_proj = linear(width, values, std)
        self.g_proj = linear(width, outputs, std)
        self.decay_down = linear(width, options.gate_rank, std)
        self.decay_up = linear(options.gate_rank, keys, std, bias=True)
        self.convs = Convolutions({"q": queries, "k": keys, "v": values}, options.conv)
        self.norm = options.gated_norm(self.value_dim, model)
        self.o_proj = linear(outputs, width, std / (2 * model.num_layers) ** 0.5)

    @classmethod
    def check(cls, options: Options, model: ModelRecipe) -> None:
        super().check(options, model)
        heads, width = geometry(options, model)
        cls.check_expansion("expand_k", width, options.expand_k)
        cls.check_expansion("expand_v", width, options.expand_v)
        if options.kv_heads and heads % options.kv_heads:
            raise RecipeError(f"mixer.gla.kv_heads = {options.kv_heads}: must divide the {heads} query heads")
        if options.gate_rank < 1:
            raise RecipeError(f"mixer.gla.gate_rank = {options.gate_rank}: must be at least 1")
        if options.gate_normalizer <= 0:
            raise RecipeError(f"mixer.gla.gate_normalizer = {options.gate_normalizer}: must be positive")
        if options.clamp_min is not None and options.clamp_min >= 0:
            raise RecipeError(f"mixer.gla.clamp_min = {options.clamp_min}: must be below zero, it bounds a log decay")

    @classmethod
    def head_groups(cls, options: Options, model: ModelRecipe) -> tuple[str, int]:
        return "kv_heads", _dims(options, model)[1]

    def state_spec(self) -> dict[str, StateSpec]:
        recurrent = StateSpec((self.kv_heads, self.key_dim, self.value_dim), Carry.RECURRENT)
        return {"recurrent": recurrent, **self.convs.state_spec()}

    def tensor_parallel(self) -> dict[str, Placement]:
        placements = {f"{name}_proj.weight": Shard(0) for name in "qkvg"}
        placements |= {"decay_down.weight": Replicate(), "decay_up.weight": Shard(0), "decay_up.bias": Shard(0)}
        placements |= self.convs.tensor_parallel("convs")
        placements |= {f"norm.{name}": Replicate() for name, _ in self.norm.named_parameters()}
        return placements | {"o_proj.weight": Shard(1)}

    def kernel_calls(self, device: str, dtype: torch.dtype) -> Iterator[KernelCall]:
        yield OPERATOR, self.backend, Call("diagonal", device, dtype, self.key_dim)

    def mixing_flops(self, length: int) -> float:
        return linear_recurrence_flops(self.heads, self.key_dim, self.value_dim)

    def log_decay(self, logits: Tensor) -> Tensor:
        """[T, G K] -> log decays in float32."""
        log_decay = F.logsigmoid(in_float32(logits)) / self.normalizer
        return log_decay if self.clamp_min is None else log_decay.clamp(min=self.clamp_min)

    def features(self, parts: dict[str, Tensor], log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q [T, H, K], k and log decays [T, G, K], v [T, G, V]; head counts are read from the shapes."""
        q, k = (self.phi(parts[name]).unflatten(-1, (-1, self.key_dim)) for name in "qk")
        return q, k, parts["v"].unflatten(-1, (-1, self.value_dim)), log_decay.unflatten(-1, (-1, self.key_dim))

    def read(self, parts: Parts, past: Past) -> tuple[Tensor, After]:
        convolved, after = self.convs({name: parts[name] for name in "qkv"}, past)
        state = past.state.get("recurrent")
        q, k, v, log_decay = self.features(convolved, self.log_decay(parts["decay"]))
        o, after["recurrent"] = linear_recurrence(
            q, k, v, log_decay, past, state, scale=self.scale, backend=self.backend
        )
        return o, after

    def output(self, o: Tensor, gate: Tensor) -> Tensor:
        """[T, H, V], [T, H V] -> [T, D]."""
        return self.o_proj(self.norm(o, gate.unflatten(-1, (-1, self.value_dim))).flatten(-2))
