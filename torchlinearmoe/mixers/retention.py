"""Multi-scale retention (Sun et al. 2023, arXiv 2307.08621, RetNet).

    S_t = gamma_h S_{t-1} + k_t v_t^T,      o_t = S_t^T q_t / sqrt(K),      gamma_h = 1 - 2^(-5 - h)
    y_t = W_o (RMSNorm(o_t) * swish(W_g x_t))

q and k are rotated by their position in the document, before the recurrence and after the map; h counts all heads of
the layer. The norm is one a head with a weight for all heads; the paper's GroupNorm also takes away a head's mean,
which its authors' code does not. The paper's score normalisations cancel in the norm.

Shapes: T tokens, D width, H heads, K and V key and value width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import Placement, Replicate, Shard

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import linear
from torchlinearmoe.kernels.choose import KernelCall
from torchlinearmoe.kernels.linear import OPERATOR, linear_recurrence_flops
from torchlinearmoe.kernels.operator import Call
from torchlinearmoe.layers.convolution import Convolutions
from torchlinearmoe.layers.past import After, Past
from torchlinearmoe.layers.rope import rotate
from torchlinearmoe.mixers.base import (
    Carry,
    Context,
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
from torchlinearmoe.recipe.schema import ModelRecipe


@dataclass(frozen=True, kw_only=True)
class Options(GatedOutput):
    """`[mixer.retention]`."""

    expand_v: float = 2.0
    """Value width as a multiple of the key width."""
    rope_theta: float = 10000.0
    """Base of the rotary angles of q and k; 0 for no rotation."""
    feature_map: Literal["elu", "relu", "silu", "identity"] = "identity"
    """Map of q and k; `elu` is elu(x) + 1."""
    conv: int = 0
    """Taps of a short convolution with SiLU on q, k and v; 0 for none."""


@register("retention")
class Retention(LinearMixer[Options]):
    """Constant decay, rotary positions, gated per-head norm."""

    Options = Options
    variants = (
        {"rope_theta": 0.0, "expand_v": 1.0, "feature_map": "silu"},
        {"conv": 4, "heads": 3, "head_dim": 16, "rope_theta": 500.0},
        {"output_norm": "none", "gate_activation": "sigmoid"},
    )
    float8 = ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj")
    reads = {"q": ("q_proj",), "gate": ("g_proj",)}
    writes = {"k": ("k_proj",), "v": ("v_proj",)}

    def __init__(self, options: Options, model: ModelRecipe, place: LayerPlace) -> None:
        super().__init__(options, model, place)
        self.heads, self.head_dim = geometry(options, model)
        self.value_dim = expanded(self.head_dim, options.expand_v)
        self.theta = options.rope_theta
        self.phi = ELEMENTWISE[options.feature_map]
        self.backend = model.kernel_backend
        self.scale = self.head_dim**-0.5
        width, std = model.hidden_size, model.init_std
        keys, values = self.heads * self.head_dim, self.heads * self.value_dim
        self.q_proj = linear(width, keys, std)
        self.k_proj = linear(width, keys, std)
        self.v_proj = linear(width, values, std)
        self.g_proj = linear(width, values, std)
        self.convs = Convolutions({"q": keys, "k": keys, "v": values}, options.conv)
        self.norm = options.gated_norm(self.value_dim, model)
        self.o_proj = linear(values, width, std / (2 * model.num_layers) ** 0.5)

    @classmethod
    def check(cls, options: Options, model: ModelRecipe) -> None:
        super().check(options, model)
        width = geometry(options, model)[1]
        cls.check_expansion("expand_v", width, options.expand_v)
        if options.rope_theta and options.rope_theta <= 1:
            raise RecipeError(f"mixer.retention.rope_theta = {options.rope_theta}: must be above 1, or 0 for none")
        if options.rope_theta and width % 2:
            raise RecipeError(f"mixer.retention.head_dim = {width}: rotary positions need an even head width")

    def state_spec(self) -> dict[str, StateSpec]:
        recurrent = StateSpec((self.heads, self.head_dim, self.value_dim), Carry.RECURRENT)
        return {"recurrent": recurrent, **self.convs.state_spec()}

    def tensor_parallel(self) -> dict[str, Placement]:
        placements = {f"{name}_proj.weight": Shard(0) for name in "qkvg"}
        placements |= self.convs.tensor_parallel("convs")
        placements |= {f"norm.{name}": Replicate() for name, _ in self.norm.named_parameters()}
        return placements | {"o_proj.weight": Shard(1)}

    def kernel_calls(self, device: str, dtype: torch.dtype) -> Iterator[KernelCall]:
        yield OPERATOR, self.backend, Call("constant", device, dtype, self.head_dim)

    def mixing_flops(self, length: int) -> float:
        return linear_recurrence_flops(self.heads, self.head_dim, self.value_dim)

    def log_decay(self, q: Tensor) -> Tensor:
        """log gamma of the heads of q [T, H, K] in this module, [H] in float64."""
        heads = torch.arange(self.first_head, self.first_head + q.shape[1], device=q.device)
        return torch.log1p(-torch.exp2(-5.0 - heads.double()))

    def rotary(self, context: Context, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines [T, K / 2], None without rotation."""
        return context.rotary(self.head_dim, self.theta, dtype) if self.theta else None

    def features(self, parts: dict[str, Tensor], angles: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Mapped and rotated q and k [T, H, K], v [T, H, V]; head counts are read from the shapes."""
        q, k = (self.phi(parts[name]).unflatten(-1, (-1, self.head_dim)) for name in "qk")
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        return q, k, parts["v"].unflatten(-1, (-1, self.value_dim))

    def prepare(self, parts: Parts, context: Context) -> Parts:
        return {**parts, "angles": self.rotary(context, parts["q"].dtype)}

    def read(self, parts: Parts, past: Past) -> tuple[Tensor, After]:
        convolved, after = self.convs({name: parts[name] for name in "qkv"}, past)
        q, k, v = self.features(convolved, parts["angles"])
        decay, state = self.log_decay(q), past.state.get("recurrent")
        o, after["recurrent"] = linear_recurrence(q, k, v, decay, past, state, scale=self.scale, backend=self.backend)
        return o, after

    def output(self, o: Tensor, gate: Tensor) -> Tensor:
        """[T, H, V], [T, H V] -> [T, D]."""
        return self.o_proj(self.norm(o, gate.unflatten(-1, (-1, self.value_dim))).flatten(-2))
