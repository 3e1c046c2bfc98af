"""Gated slot attention (Zhang et al. 2024, arXiv 2409.07146).

    log a_t = log sigmoid(W_f x_t) / 8,      s_t = 1 - a_t                                  one of each for a slot
    K_t = K_{t-1} diag(a_t) + k_t s_t^T,     V_t = diag(a_t) V_{t-1} + s_t v_t^T            q, k, v = swish(W x)
    o_t = V_t^T softmax(K_t^T q_t)
    y_t = W_o RMSNorm(swish(o_t))

Softmax attention over a fixed number of slots instead of over the past: a slot keeps a moving average of keys and of
values. The norm spans all heads; there is no output gate.

Shapes: T tokens, D width, H query heads, G key-value heads (each read by H / G neighbouring query heads), K and V key
and value width of a head, S slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import Placement, Shard

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import linear
from torchlinearmoe.kernels.choose import KernelCall
from torchlinearmoe.kernels.linear import linear_recurrence_flops
from torchlinearmoe.kernels.operator import Call
from torchlinearmoe.kernels.slots import OPERATOR
from torchlinearmoe.kernels.slots.kinds import slot_kind
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
from torchlinearmoe.mixers.linear_mixer import LinearMixer, Parts
from torchlinearmoe.mixers.output import NormedOutput
from torchlinearmoe.mixers.recurrence import slot_attention
from torchlinearmoe.precision import in_float32
from torchlinearmoe.recipe.schema import ModelRecipe

SCALE = 1.0
"""Of the scores of the slots; the paper leaves 1 / sqrt(K) out."""


@dataclass(frozen=True, kw_only=True)
class Options(NormedOutput):
    """`[mixer.gsa]`."""

    slots: int = 64
    """Slots of a head."""
    kv_heads: int = 0
    """Heads of k, v and the slots, a divisor of the query heads; 0 for as many."""
    expand_k: float = 1.0
    """Key width as a multiple of a head's width."""
    expand_v: float = 1.0
    """Value width as a multiple of a head's width."""
    gate_normalizer: float = 8.0
    """Divisor of the log decays; larger ones remember longer."""
    conv: int = 0
    """Taps of a short convolution on q, k and v, in front of their SiLU; 0 for none."""


def _dims(options: Options, model: ModelRecipe) -> tuple[int, int, int, int]:
    """(query heads, key-value heads, key width, value width)."""
    heads, width = geometry(options, model)
    return heads, options.kv_heads or heads, expanded(width, options.expand_k), expanded(width, options.expand_v)


@register("gsa")
class GSA(LinearMixer[Options]):
    """Diagonal decay over slots, of keys and of values; read by softmax; full-width norm."""

    Options = Options
    variants = (
        {"slots": 5, "conv": 3, "expand_v": 1.5},
        {"heads": 4, "head_dim": 16, "kv_heads": 2, "slots": 16, "expand_k": 0.5, "gate_normalizer": 4.0},
        {"output_norm": "none"},
    )
    float8 = ("q_proj", "k_proj", "v_proj", "o_proj")
    reads = {"q": ("q_proj",)}
    writes = {"k": ("k_proj",), "v": ("v_proj",), "f": ("f_proj",)}

    def __init__(self, options: Options, model: ModelRecipe, place: LayerPlace) -> None:
        super().__init__(options, model, place)
        self.heads, self.kv_heads, self.key_dim, self.value_dim = _dims(options, model)
        self.slots = options.slots
        self.normalizer = options.gate_normalizer
        self.backend = model.kernel_backend
        width, std = model.hidden_size, model.init_std
        queries, keys, values = self.heads * self.key_dim, self.kv_heads * self.key_dim, self.kv_heads * self.value_dim
        outputs = self.heads * self.value_dim
        self.q_proj = linear(width, queries, std)
        self.k_proj = linear(width, keys, std)
        self.v_proj = linear(width, values, std)
        self.f_proj = linear(width, self.kv_heads * self.slots, std)
        self.convs = Convolutions({"q": queries, "k": keys, "v": values}, options.conv, always_activate=True)
        self.norm = options.norm(outputs, model)
        self.o_proj = linear(outputs, width, std / (2 * model.num_layers) ** 0.5)

    @classmethod
    def check(cls, options: Options, model: ModelRecipe) -> None:
        super().check(options, model)
        heads, width = geometry(options, model)
        cls.check_expansion("expand_k", width, options.expand_k)
        cls.check_expansion("expand_v", width, options.expand_v)
        if options.slots < 1:
            raise RecipeError(f"mixer.gsa.slots = {options.slots}: must be at least 1")
        if options.kv_heads and heads % options.kv_heads:
            raise RecipeError(f"mixer.gsa.kv_heads = {options.kv_heads}: must divide the {heads} query heads")
        if options.gate_normalizer <= 0:
            raise RecipeError(f"mixer.gsa.gate_normalizer = {options.gate_normalizer}: must be positive")

    @classmethod
    def head_groups(cls, options: Options, model: ModelRecipe) -> tuple[str, int]:
        return "kv_heads", _dims(options, model)[1]

    def state_spec(self) -> dict[str, StateSpec]:
        return {
            "slot_keys": StateSpec((self.kv_heads, self.key_dim, self.slots), Carry.RECURRENT),
            "slot_values": StateSpec((self.kv_heads, self.slots, self.value_dim), Carry.RECURRENT),
            **self.convs.state_spec(),
        }

    def tensor_parallel(self) -> dict[str, Placement]:
        placements = {f"{name}_proj.weight": Shard(0) for name in "qkvf"}
        placements |= self.convs.tensor_parallel("convs")
        placements |= {f"norm.{name}": Shard(0) for name, _ in self.norm.named_parameters()}
        return placements | {"o_proj.weight": Shard(1)}

    def kernel_calls(self, device: str, dtype: torch.dtype) -> Iterator[KernelCall]:
        yield OPERATOR, self.backend, Call(slot_kind(self.slots), device, dtype, self.key_dim)

    def mixing_flops(self, length: int) -> float:
        """Two passes: slots from keys, values from slots."""
        into = linear_recurrence_flops(self.heads, self.key_dim, self.slots)
        return into + linear_recurrence_flops(self.heads, self.slots, self.value_dim)

    def log_decay(self, logits: Tensor) -> Tensor:
        """[T, G S] -> log decays in float32."""
        return F.logsigmoid(in_float32(logits)) / self.normalizer

    def features(self, parts: dict[str, Tensor], log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q [T, H, K], k [T, G, K], v [T, G, V], writes and log decays [T, G, S]; head counts are the shapes'."""
        q, k = (parts[name].unflatten(-1, (-1, self.key_dim)) for name in "qk")
        v, log_decay = parts["v"].unflatten(-1, (-1, self.value_dim)), log_decay.unflatten(-1, (-1, self.slots))
        return q, k, v, -torch.expm1(log_decay).to(q.dtype), log_decay

    def read(self, parts: Parts, past: Past) -> tuple[Tensor, After]:
        convolved, after = self.convs({name: parts[name] for name in "qkv"}, past)
        q, k, v, s, log_decay = self.features(convolved, self.log_decay(parts["f"]))
        keys, values = (past.state.get(name) for name in ("slot_keys", "slot_values"))
        o, after["slot_keys"], after["slot_values"] = slot_attention(
            q, k, v, s, log_decay, past, keys, values, scale=SCALE, backend=self.backend
        )
        return o, after

    def output(self, o: Tensor) -> Tensor:
        """[T, H, V] -> [T, D]."""
        return self.o_proj(self.norm(F.silu(o.flatten(-2))))
