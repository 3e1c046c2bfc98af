"""Linear attention without decay (Katharopoulos et al. 2020, arXiv 2006.16236).

    S_t = S_{t-1} + phi(k_t) v_t^T,      o_t = S_t^T phi(q_t) / sqrt(K)      [/ (phi(q_t)^T sum_s phi(k_s) / sqrt(K))]
    y_t = W_o (RMSNorm(o_t) * swish(W_g x_t))

The default keeps the norm and gate and leaves the denominator out; `normalize = true` divides, with positive maps only.
The denominator is one more value column of ones. phi is one of `feature_maps.py`; learned ones are shared by the heads,
one for queries and one for keys.

Shapes: T tokens, D width, H heads, K and V key and value width of a head, F features of a key head.
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
from torchlinearmoe.mixers.base import (
    Carry,
    LayerPlace,
    StateSpec,
    expanded,
    geometry,
    register,
)
from torchlinearmoe.mixers.feature_maps import (
    FREE_WIDTH,
    LEARNED,
    POSITIVE,
    feature_width,
    make_feature_map,
)
from torchlinearmoe.mixers.linear_mixer import LinearMixer, Parts
from torchlinearmoe.mixers.output import GatedOutput
from torchlinearmoe.mixers.recurrence import linear_recurrence
from torchlinearmoe.recipe.schema import ModelRecipe

EPSILON = 1e-6
"""Added to the denominator."""


@dataclass(frozen=True, kw_only=True)
class Options(GatedOutput):
    """`[mixer.linear_attention]`."""

    expand_v: float = 1.0
    """Value width as a multiple of the key width."""
    feature_map: Literal["elu", "relu", "silu", "identity", "t2r", "hedgehog", "dpfp", "hadamard"] = "elu"
    """phi; `elu` is elu(x) + 1, the others are in `feature_maps.py`."""
    feature_dim: int = 0
    """Features of `t2r` and `hadamard`; 0 for the key width."""
    nu: int = 4
    """Neighbours that `dpfp` multiplies by; 2 K nu features."""
    feature_scale: float = 1.0
    """What `hedgehog` multiplies by before its softmax; flash-linear-attention takes 2."""
    tie_feature_maps: bool = False
    """One learned map for queries and keys together."""
    normalize: bool = False
    """Divide by the sum of the scores; needs a positive feature map."""
    conv: int = 0
    """Taps of a short convolution on q, k and v; 0 for none."""


@register("linear_attention", "lasp2")
class LinearAttention(LinearMixer[Options]):
    """Identity transition; optional denominator; gated per-head norm."""

    Options = Options
    variants = (
        {"normalize": True},
        {"normalize": True, "feature_map": "relu", "expand_v": 2.0},
        {"feature_map": "silu", "conv": 3},
        {"feature_map": "identity", "heads": 3, "head_dim": 16, "expand_v": 0.5},
        {"feature_map": "t2r", "feature_dim": 20, "normalize": True},
        {"feature_map": "hedgehog", "normalize": True, "conv": 3},
        {"feature_map": "hedgehog", "tie_feature_maps": True, "heads": 3, "head_dim": 16, "expand_v": 0.5},
        {"feature_map": "hedgehog", "feature_scale": 2.0},
        {"feature_map": "dpfp", "nu": 2, "normalize": True},
        {"feature_map": "hadamard", "feature_dim": 12},
        {"output_norm": "none", "gate_activation": "sigmoid"},
    )
    float8 = ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj")
    reads = {"q": ("q_proj",), "gate": ("g_proj",)}
    writes = {"k": ("k_proj",), "v": ("v_proj",)}

    def __init__(self, options: Options, model: ModelRecipe, place: LayerPlace) -> None:
        super().__init__(options, model, place)
        self.heads, self.head_dim = geometry(options, model)
        self.value_dim = expanded(self.head_dim, options.expand_v)
        phi = (options.feature_map, self.head_dim, options.feature_dim, options.nu)
        scale = options.feature_scale
        self.features_per_head = feature_width(*phi)
        self.q_map = make_feature_map(*phi, scale)
        self.k_map = None if options.tie_feature_maps else make_feature_map(*phi, scale)
        # Every head applies the maps, while the parameters of a map count once.
        entries = sum(parameter.numel() for parameter in self.q_map.parameters() if parameter.dim() == 2)
        self.map_flops = 2.0 * entries * (2 * self.heads - (1 if self.k_map is None else 2))
        self.normalize = options.normalize
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
        head_dim = geometry(options, model)[1]
        cls.check_expansion("expand_v", head_dim, options.expand_v)
        name = options.feature_map
        if options.feature_dim and name not in FREE_WIDTH:
            raise RecipeError(
                f"mixer.linear_attention.feature_dim = {options.feature_dim}: only {' and '.join(FREE_WIDTH)} choose "
                f"their features, not '{name}'"
            )
        if options.feature_scale != 1.0 and name != "hedgehog":
            raise RecipeError(
                f"mixer.linear_attention.feature_scale = {options.feature_scale:g}: only hedgehog has one, not '{name}'"
            )
        if not 0 < options.feature_scale < float("inf"):
            raise RecipeError(
                f"mixer.linear_attention.feature_scale = {options.feature_scale:g}: must be above zero and finite"
            )
        if name == "dpfp" and not 1 <= options.nu < 2 * head_dim:
            raise RecipeError(
                f"mixer.linear_attention.nu = {options.nu}: must be 1 to {2 * head_dim - 1}, below twice the head width"
            )
        if options.tie_feature_maps and name not in LEARNED:
            raise RecipeError(
                f"mixer.linear_attention.tie_feature_maps = true: '{name}' has nothing to tie; for {', '.join(LEARNED)}"
            )
        if options.normalize and options.feature_map not in POSITIVE:
            raise RecipeError(
                f"mixer.linear_attention.normalize = true: needs a positive feature_map ({', '.join(POSITIVE)}), "
                f"not '{options.feature_map}'"
            )

    def state_spec(self) -> dict[str, StateSpec]:
        columns = self.value_dim + self.normalize
        return {
            "recurrent": StateSpec((self.heads, self.features_per_head, columns), Carry.RECURRENT),
            **self.convs.state_spec(),
        }

    def tensor_parallel(self) -> dict[str, Placement]:
        placements = {f"{name}.weight": Shard(0) for name in ("q_proj", "k_proj", "v_proj", "g_proj")}
        placements |= self.convs.tensor_parallel("convs")
        placements |= {name: Replicate() for name, _ in self.named_parameters() if name.split(".")[0].endswith("_map")}
        placements |= {f"norm.{name}": Replicate() for name, _ in self.norm.named_parameters()}
        return placements | {"o_proj.weight": Shard(1)}

    def kernel_calls(self, device: str, dtype: torch.dtype) -> Iterator[KernelCall]:
        yield OPERATOR, self.backend, Call("identity", device, dtype, self.features_per_head)

    def mixing_flops(self, length: int) -> float:
        columns = self.value_dim + self.normalize
        return linear_recurrence_flops(self.heads, self.features_per_head, columns) + self.map_flops

    def features(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mapped q and k, and v with its column of ones where the scores are summed, [T, H, ...]."""
        q, k = self.q_map(q), (self.q_map if self.k_map is None else self.k_map)(k)
        v = v.unflatten(-1, (-1, self.value_dim))
        if self.normalize:
            v = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], dim=-1)
        return q, k, v

    def read(self, parts: Parts, past: Past) -> tuple[Tensor, After]:
        convolved, after = self.convs({name: parts[name] for name in "qkv"}, past)
        state = past.state.get("recurrent")
        q, k, v = self.features(convolved["q"], convolved["k"], convolved["v"])
        o, after["recurrent"] = linear_recurrence(q, k, v, None, past, state, scale=self.scale, backend=self.backend)
        return o, after

    def output(self, o: Tensor, gate: Tensor) -> Tensor:
        """[T, H, V (+ 1)], [T, H V] -> [T, D]."""
        if self.normalize:
            o, total = o[..., :-1], o[..., -1:]
            o = o / (total + EPSILON)
        gate = gate.unflatten(-1, (-1, self.value_dim))
        return self.o_proj(self.norm(o, gate).flatten(-2))
