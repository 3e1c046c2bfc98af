"""Lightning attention: linear attention with one fixed decay a head (Qin et al. 2023, arXiv 2307.14995, TransNormerLLM;
MiniMax 2025, arXiv 2501.08313).

    S_t = e^{-s_h} S_{t-1} + k_t v_t^T,      o_t = S_t^T q_t / sqrt(K),      q, k, v = swish(W x)
    s_h = ALiBi slope of head h  *  (1 - l / (L - 1 [+ e]) + 1e-5) in layer l of L
    y_t = W_o (RMSNorm(o_t) * sigmoid(W_g x_t))

The slopes are computed, not learned: 2^(-8 (h + 1) / H), h counting all heads of the model, so that early layers and
heads look near and the last layer forgets next to nothing. The papers agree on the slopes and differ after them; norm
and gate here are MiniMax-01's, one norm over all heads and a sigmoid (TransNormerLLM's gate has no activation). The
norm absorbs the scale, which the papers leave out. TransNormerLLM's positions in the first layer are left out too.

Shapes: T tokens, D width, H heads, K = V width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from torchlinearmoe.layers.norm import RMSNorm
from torchlinearmoe.layers.past import After, Past
from torchlinearmoe.mixers.base import (
    Carry,
    LayerPlace,
    MixerOptions,
    StateSpec,
    geometry,
    register,
)
from torchlinearmoe.mixers.linear_mixer import LinearMixer, Parts
from torchlinearmoe.mixers.output import check_epsilon
from torchlinearmoe.mixers.recurrence import linear_recurrence
from torchlinearmoe.recipe.schema import ModelRecipe

GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "swish": F.silu}


@dataclass(frozen=True, kw_only=True)
class Options(MixerOptions):
    """`[mixer.lightning_attention]`."""

    layer_factor: bool = True
    """Scale the slopes down with depth; false gives every layer the plain ALiBi slopes."""
    depth_eps: float = 0.0
    """Added to the number of layers but one by which that divides; 1e-5 in transformers' MiniMax."""
    norm: Literal["full", "head"] = "full"
    """RMSNorm over all heads together, or over each by itself with one weight for all."""
    norm_eps: float = 0.0
    """Epsilon of the norm; 0 for the model's. The norm sees what is read over sqrt(K), so that an epsilon for the
    papers' unscaled reads is to be divided by K."""
    gate: Literal["sigmoid", "swish"] = "sigmoid"
    """Activation of the output gate."""
    conv: int = 0
    """Taps of a short convolution on q, k and v, in front of their SiLU; 0 for none."""


def alibi_slopes(heads: Tensor, total: int) -> Tensor:
    """ALiBi slopes (Press et al. 2021, arXiv 2108.12409) of the heads with these indices among `total`, in float64.

    For P heads, a power of two: 2^(-8 (h + 1) / P). Other totals take those of the next lower P, then every second one
    of 2 P: 6 heads are 1/4 1/16 1/64 1/256 and 1/2 1/8.
    """
    power = 2 ** (total.bit_length() - 1)
    within = 8 * (heads + 1) / power
    beyond = 4 * (2 * (heads - power) + 1) / power
    return torch.exp2(-torch.where(heads < power, within, beyond).double())


@register("lightning_attention")
class LightningAttention(LinearMixer[Options]):
    """Constant decay; SiLU on q, k and v; full-width norm, then a sigmoid gate."""

    Options = Options
    variants = (
        {"layer_factor": False, "norm": "head", "gate": "swish"},
        {"conv": 3, "heads": 3, "head_dim": 16},
        {"norm_eps": 1e-2, "depth_eps": 0.5},
    )
    float8 = ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj")
    reads = {"q": ("q_proj",), "gate": ("g_proj",)}
    writes = {"k": ("k_proj",), "v": ("v_proj",)}

    def __init__(self, options: Options, model: ModelRecipe, place: LayerPlace) -> None:
        super().__init__(options, model, place)
        self.heads, self.head_dim = geometry(options, model)
        self.depth_factor = 1.0
        if options.layer_factor and (layers := model.num_layers - 1 + options.depth_eps):
            self.depth_factor = 1 - place.layer / layers + 1e-5
        self.norm_per_head = options.norm == "head"
        self.gate = GATES[options.gate]
        self.backend = model.kernel_backend
        self.scale = self.head_dim**-0.5
        inner, width, std = self.heads * self.head_dim, model.hidden_size, model.init_std
        self.q_proj = linear(width, inner, std)
        self.k_proj = linear(width, inner, std)
        self.v_proj = linear(width, inner, std)
        self.g_proj = linear(width, inner, std)
        self.convs = Convolutions(dict.fromkeys("qkv", inner), options.conv, always_activate=True)
        self.norm = RMSNorm(self.head_dim if self.norm_per_head else inner, options.norm_eps or model.norm_eps)
        self.o_proj = linear(inner, width, std / (2 * model.num_layers) ** 0.5)

    @classmethod
    def check(cls, options: Options, model: ModelRecipe) -> None:
        super().check(options, model)
        check_epsilon(cls.name, options.norm_eps)
        if options.depth_eps < 0 or (options.depth_eps and not options.layer_factor):
            raise RecipeError(
                f"mixer.{cls.name}.depth_eps = {options.depth_eps}: must be at least 0, and 0 with layer_factor = false"
            )

    def state_spec(self) -> dict[str, StateSpec]:
        recurrent = StateSpec((self.heads, self.head_dim, self.head_dim), Carry.RECURRENT)
        return {"recurrent": recurrent, **self.convs.state_spec()}

    def tensor_parallel(self) -> dict[str, Placement]:
        placements = {f"{name}_proj.weight": Shard(0) for name in "qkvg"}
        placements |= self.convs.tensor_parallel("convs")
        norm = Replicate() if self.norm_per_head else Shard(0)
        return placements | {"norm.weight": norm, "o_proj.weight": Shard(1)}

    def kernel_calls(self, device: str, dtype: torch.dtype) -> Iterator[KernelCall]:
        yield OPERATOR, self.backend, Call("constant", device, dtype, self.head_dim)

    def mixing_flops(self, length: int) -> float:
        return linear_recurrence_flops(self.heads, self.head_dim, self.head_dim)

    def log_decay(self, q: Tensor) -> Tensor:
        """Log decays of the heads of q [T, H, K] in this module, [H] in float64."""
        heads = torch.arange(self.first_head, self.first_head + q.shape[1], device=q.device)
        return -self.depth_factor * alibi_slopes(heads, self.heads)

    def read(self, parts: Parts, past: Past) -> tuple[Tensor, After]:
        convolved, after = self.convs({name: parts[name] for name in "qkv"}, past)
        q, k, v = (self.heads_of(x) for x in convolved.values())
        decay, state = self.log_decay(q), past.state.get("recurrent")
        o, after["recurrent"] = linear_recurrence(q, k, v, decay, past, state, scale=self.scale, backend=self.backend)
        return o, after

    def heads_of(self, x: Tensor) -> Tensor:
        """[T, H K] -> [T, H, K]; the head count is read from the shape."""
        return x.unflatten(-1, (-1, self.head_dim))

    def output(self, o: Tensor, gate: Tensor) -> Tensor:
        """[T, H, K], [T, H K] -> [T, D]."""
        normed = self.norm(o).flatten(-2) if self.norm_per_head else self.norm(o.flatten(-2))
        return self.o_proj(normed * self.gate(gate))
