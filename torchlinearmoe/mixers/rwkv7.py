"""RWKV7 (Goose), time mixing: the generalised delta rule with a decay and a learning rate per channel.

Peng et al. 2025, arXiv 2503.14456, section 4. x'_t is the token before x_t in the same document:

    x^i_t = x_t + mu_i * (x'_t - x_t)                                    i = r, w, k, v, a, g
    r_t, k_t, v_t = W_r x^r_t, W_k x^k_t, W_v x^v_t
    log w_t = -e^(-1/2) sigmoid(w_0 + W_w2 tanh(W_w1 x^w_t))             per channel, in float32
    a_t = sigmoid(a_0 + W_a2 W_a1 x^a_t)                                 in-context learning rate per channel
    kappa_t = k_t * xi, of unit length per head                          removal key
    k~_t = k_t * (1 + (a_t - 1) * alpha)                                 replacement key
    v_t += (v^1_t - v_t) * sigmoid(v_0 + W_v2 W_v1 x^v_t)                v^1: the values of the first such layer
    S_t = (diag(w_t) - (a_t * kappa_t) kappa_t^T) S_{t-1} + k~_t v_t^T,      o_t = S_t^T r_t
    y_t = W_o ((GroupNorm(o_t) + (rho * r_t . k~_t) v_t) * W_g2 sigmoid(W_g1 x^g_t))

A group is a head, its eps the head's width times 1e-5. The state is S and the last input; v^1 is the carried tensor
`v_first`. w_0 stays in float32 in a module of its own. Initial values are those of the authors' training code
(RWKV-LM, `RWKV-v7/train_temp`), but for W_o, which starts as in every other mixer where theirs is zero.

Shapes: T tokens, D width, H heads of K = V, R rank, N documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard

from torchlinearmoe.initialize import Constant, Initializer, Orthogonal, Rows, linear, orthogonal, set_initializers
from torchlinearmoe.kernels.choose import KernelCall
from torchlinearmoe.kernels.delta import l2_normalize
from torchlinearmoe.kernels.dplr import OPERATOR, dplr_rule_flops
from torchlinearmoe.kernels.operator import Call
from torchlinearmoe.layers.convolution import token_shift
from torchlinearmoe.layers.past import Past
from torchlinearmoe.mixers.base import (
    Carried,
    Carry,
    Context,
    LayerPlace,
    Mixer,
    MixerOptions,
    State,
    StateSpec,
    geometry,
    register,
)
from torchlinearmoe.mixers.recurrence import dplr_rule
from torchlinearmoe.mixers.rwkv import Depth, HeadGroupNorm
from torchlinearmoe.module import Module
from torchlinearmoe.precision import in_float32
from torchlinearmoe.recipe.schema import ModelRecipe

MIXES = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
"""The inputs that each have a mix with the token before, and the power of their initial ramp."""
LOWEST = -math.exp(-0.5)
"""No log decay is below it."""
RANKS = {"decay_rank": 2.5, "rate_rank": 2.5, "value_rank": 1.7, "gate_rank": 5.0}
"""Default ranks in units of the square root of the width, rounded to multiples of 32."""


@dataclass(frozen=True, kw_only=True)
class Options(MixerOptions):
    """`[mixer.rwkv7]`; a rank of 0 takes the paper's multiple of the square root of the width."""

    decay_rank: int = 0
    """Rank of the data-dependent part of the decay."""
    rate_rank: int = 0
    """Rank of the data-dependent part of the in-context learning rate."""
    value_rank: int = 0
    """Rank of the data-dependent part of the mix with the first layer's values."""
    gate_rank: int = 0
    """Rank of the output gate."""


def _ranks(options: Options, width: int) -> dict[str, int]:
    """The rank of each low-rank part, by the option's name."""
    return {
        name: getattr(options, name) or max(32, 32 * round(factor * width**0.5 / 32)) for name, factor in RANKS.items()
    }


@dataclass(frozen=True)
class _Recipe:
    """The authors' initial values per channel n of C = H K, x = n / (C - 1)."""

    depth: Depth
    heads: int
    head_dim: int

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    def decay(self) -> Rows:
        """w_0 = -5.5 + 6 x^(1 + rising^0.3) + 2.5 zigzag: from slow channels to fast ones, and within each head."""
        power = 1 + self.depth.rising**0.3
        return Rows(lambda n: -5.5 + 6 * self._x(n) ** power + 2.5 * self._zigzag(n))

    def rate(self) -> Rows:
        """a_0 = -0.19 + 0.3 zigzag + 0.4 (x - 1/2)."""
        return Rows(lambda n: -0.19 + 0.3 * self._zigzag(n) + 0.4 * (self._x(n) - 0.5))

    def first_value(self) -> Rows:
        """v_0 = 0.73 - 0.4 (x - 1/2)."""
        return Rows(lambda n: 0.73 - 0.4 * (self._x(n) - 0.5))

    def removal(self) -> Rows:
        """xi = 0.71 - 0.1 (x - 1/2)."""
        return Rows(lambda n: 0.71 - 0.1 * (self._x(n) - 0.5))

    def _x(self, n: Tensor) -> Tensor:
        return n / max(self.channels - 1, 1)

    def _zigzag(self, n: Tensor) -> Tensor:
        """z |z|, z from -1 to 1 over the channels of a head."""
        half = max(self.head_dim - 1, 1) / 2
        z = (n % self.head_dim) / half - 1
        return z * z.abs()


class Decay(Module):
    """log w = -e^(-1/2) sigmoid(w_0 + logits), w_0 kept and used in float32."""

    keep_fp32 = True
    no_weight_decay = ("base",)

    def __init__(self, head_dim: int, channels: int, base: Initializer) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.base = nn.Parameter(torch.empty(channels))
        set_initializers(self, base=base)

    def forward(self, logits: Tensor) -> Tensor:
        """[T, H K] -> log decays [T, H, K] between `LOWEST` and 0."""
        return LOWEST * torch.sigmoid(self.base + logits.to(self.base.dtype)).unflatten(-1, (-1, self.head_dim))


class LowRank(Module):
    """up(activation(down(x))); what it makes of the data is zero at first, so that only the bias is left."""

    no_weight_decay = ("down.weight", "up.weight")

    def __init__(
        self, inputs: int, rank: int, outputs: int, activation: str | None = None, bias: Initializer | None = None
    ) -> None:
        super().__init__()
        self.activation = activation
        self.down = linear(inputs, rank, 0.0)
        self.up = nn.Linear(rank, outputs, bias=bias is not None)
        up = Orthogonal(0.1 / outputs**0.5)
        set_initializers(self.up, weight=up, **({} if bias is None else {"bias": bias}))

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, outputs]."""
        low = self.down(x_TD)
        return self.up(low if self.activation is None else getattr(torch, self.activation)(low))

    def tensor_parallel(self, prefix: str) -> dict[str, Placement]:
        """The outputs are channels of heads."""
        placements: dict[str, Placement] = {f"{prefix}.down.weight": Replicate(), f"{prefix}.up.weight": Shard(0)}
        return placements if self.up.bias is None else placements | {f"{prefix}.up.bias": Shard(0)}


@register("rwkv7")
class RWKV7(Mixer[Options]):
    """Dense transition, token shift, values that go on from the first layer's."""

    projections = {"q": "r_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
    Options = Options
    variants = (
        {"decay_rank": 5, "rate_rank": 3, "value_rank": 2, "gate_rank": 7},
        {"heads": 3, "head_dim": 16},
    )
    float8 = ("r_proj", "k_proj", "v_proj", "o_proj")
    regions = ("project", "mix")

    def __init__(self, options: Options, model: ModelRecipe, place: LayerPlace) -> None:
        super().__init__(options, model, place)
        self.heads, self.head_dim = geometry(options, model)
        self.backend = model.kernel_backend
        self.sets_values = place.ordinal == 0
        inner, width = self.heads * self.head_dim, model.hidden_size
        ranks = _ranks(options, width)
        depth = Depth(place.layer, model.num_layers)
        recipe = _Recipe(depth, self.heads, self.head_dim)
        self.mixes = nn.ParameterDict({name: nn.Parameter(torch.empty(width)) for name in MIXES})
        set_initializers(self.mixes, **{name: depth.ramp(width, power) for name, power in MIXES.items()})
        self.r_proj = orthogonal(width, inner, 1.0)
        self.k_proj = orthogonal(width, inner, 0.1)
        self.v_proj = orthogonal(width, inner, 1.0)
        self.decay_lora = LowRank(width, ranks["decay_rank"], inner, "tanh")
        self.decay = Decay(self.head_dim, inner, recipe.decay())
        self.rate_lora = LowRank(width, ranks["rate_rank"], inner, bias=recipe.rate())
        if not self.sets_values:
            self.value_lora = LowRank(width, ranks["value_rank"], inner, bias=recipe.first_value())
        self.gate_lora = LowRank(width, ranks["gate_rank"], inner, "sigmoid")
        self.removal = nn.Parameter(torch.empty(inner))
        self.replacement = nn.Parameter(torch.empty(inner))
        self.bonus = nn.Parameter(torch.empty(inner))
        set_initializers(self, removal=recipe.removal(), replacement=Constant(1.02), bonus=Constant(-0.04))
        self.norm = HeadGroupNorm(self.heads, self.head_dim, self.head_dim * 1e-5, depth.norm())
        self.o_proj = linear(inner, width, model.init_std / (2 * model.num_layers) ** 0.5)

    @classmethod
    def carried_channels(cls, options: Options, model: ModelRecipe) -> dict[str, int]:
        heads, head_dim = geometry(options, model)
        return {"v_first": heads * head_dim}

    def state_spec(self) -> dict[str, StateSpec]:
        return {
            "recurrent": StateSpec((self.heads, self.head_dim, self.head_dim), Carry.RECURRENT),
            "shift": StateSpec((1, self.mixes["r"].shape[0]), Carry.LAST_TOKENS, fp32=False),
        }

    def tensor_parallel(self) -> dict[str, Placement]:
        """Mixes are on every rank, but each rank sees only what its own heads make of them."""
        placements: dict[str, Placement] = {f"{name}_proj.weight": Shard(0) for name in "rkv"}
        placements |= {f"mixes.{name}": Replicate() for name in MIXES}
        for name, part in self.named_children():
            if isinstance(part, LowRank):
                placements |= part.tensor_parallel(name)
        channels = ("decay.base", "removal", "replacement", "bonus", "norm.weight", "norm.bias")
        return placements | {name: Shard(0) for name in channels} | {"o_proj.weight": Shard(1)}

    def kernel_calls(self, device: str, dtype: torch.dtype) -> Iterator[KernelCall]:
        yield OPERATOR, self.backend, Call("dplr", device, dtype, self.head_dim)

    def mixing_flops(self, length: int) -> float:
        return dplr_rule_flops(self.heads, self.head_dim, self.head_dim)

    def project(self, x_TD: Tensor, v_first: Tensor | None, past: Past) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Token shift, mixes and projections: r, k, v, rate, gate, decay logits, [T, H K] each; and the last inputs."""
        before_TD, last = token_shift(x_TD, past, past.state.get("shift"))
        r, w, k, v, a, g = (torch.lerp(x_TD, before_TD, self.mixes[name]) for name in "rwkvag")
        value = self.v_proj(v)
        if v_first is not None:
            value = torch.lerp(value, v_first, torch.sigmoid(self.value_lora(v)))
        rate = torch.sigmoid(self.rate_lora(a))
        return (self.r_proj(r), self.k_proj(k), value, rate, self.gate_lora(g), self.decay_lora(w)), last

    def mix(
        self, r: Tensor, k: Tensor, v: Tensor, rate: Tensor, gate: Tensor, log_decay: Tensor, past: Past
    ) -> tuple[Tensor, Tensor | None]:
        """Keys, recurrence, norm, bonus and output projection, -> [T, D], and the recurrent state."""
        removal = l2_normalize(self.heads_of(k * self.removal), eps=1e-12)
        k = k * (1 + (rate - 1) * self.replacement)
        bonus = self.heads_of(in_float32(r * self.bonus) * k).sum(-1, keepdim=True)
        r, k, v, rate = (self.heads_of(x) for x in (r, k, v, rate))
        o, after = dplr_rule(
            r,
            k,
            v,
            -removal,
            removal * rate,
            log_decay,
            past,
            past.state.get("recurrent"),
            scale=1.0,
            lower_bound=LOWEST,
            backend=self.backend,
        )
        y = self.norm(o) + (bonus * v).flatten(-2)
        return self.o_proj((y * gate).to(gate.dtype)), after

    def heads_of(self, x: Tensor) -> Tensor:
        """[T, H K] -> [T, H, K]."""
        return x.unflatten(-1, (-1, self.head_dim))

    def forward(
        self, x_TD: Tensor, context: Context, state: State | None = None, carried: Carried | None = None
    ) -> tuple[Tensor, State | None, Carried]:
        past, carried = context.past(state), carried or {}
        v_first = None if self.sets_values else carried["v_first"]
        (r, k, v, rate, gate, logits), last = self.region("project", past)(x_TD, v_first, past)
        y_TD, recurrent = self.region("mix", past)(r, k, v, rate, gate, self.decay(logits), past)
        after = None if state is None else {"recurrent": recurrent, "shift": last}
        return y_TD, after, {**carried, "v_first": v} if self.sets_values else carried
