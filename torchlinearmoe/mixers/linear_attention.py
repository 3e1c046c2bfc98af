"""Linear attention without decay (Katharopoulos et al. 2020, arXiv 2006.16236).

    S_t = S_{t-1} + phi(k_t) v_t^T,      o_t = S_t^T phi(q_t) / sqrt(K)      [/ (phi(q_t)^T sum_s phi(k_s) / sqrt(K))]
    y_t = W_o (RMSNorm(o_t) * swish(W_g x_t))

The default keeps the norm and gate and leaves the denominator out; `normalize = true` divides, with positive maps only.
The denominator is one more value column of ones.

Shapes: T tokens, D width, H heads, K and V key and value width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import linear
from torchlinearmoe.kernels import ops
from torchlinearmoe.kernels.flops import linear_recurrence_flops
from torchlinearmoe.mixers.base import (
    REPLICATED_SUMMED,
    Carried,
    Carry,
    Context,
    Mixer,
    MixerOptions,
    ModelDims,
    Place,
    State,
    StateSpec,
    TensorWord,
    Transition,
    column,
    expanded,
    geometry,
    register,
    row,
)
from torchlinearmoe.mixers.recurrence import resume_linear
from torchlinearmoe.mixers.tail import Convolutions, GatedHeadNorm

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "silu": F.silu,
    "identity": lambda x: x,
}
POSITIVE = ("elu", "relu")
EPSILON = 1e-6
"""Added to the denominator."""


@dataclass(frozen=True, kw_only=True)
class Options(MixerOptions):
    """`[mixer.linear_attention]`."""

    expand_v: float = 1.0
    """Value width as a multiple of the key width."""
    feature_map: Literal["elu", "relu", "silu", "identity"] = "elu"
    """phi; `elu` is elu(x) + 1."""
    normalize: bool = False
    """Divide by the sum of the scores; needs a positive feature map."""
    conv: int = 0
    """Taps of a short convolution on q, k and v; 0 for none."""


@register("linear_attention", "lasp2")
class LinearAttention(Mixer):
    """Identity transition; optional denominator; gated per-head norm."""

    transition = Transition.IDENTITY
    Options = Options
    variants = (
        {"normalize": True},
        {"normalize": True, "feature_map": "relu", "expand_v": 2.0},
        {"feature_map": "silu", "conv": 3},
        {"feature_map": "identity", "heads": 3, "head_dim": 16, "expand_v": 0.5},
    )
    regions = ("project", "mix")

    def __init__(self, options: Options, model: ModelDims, place: Place) -> None:
        super().__init__()
        self.heads, self.head_dim = geometry(options, model)
        self.value_dim = expanded(self.head_dim, options.expand_v)
        self.phi = FEATURE_MAPS[options.feature_map]
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
        self.norm = GatedHeadNorm(self.value_dim, model.norm_eps)
        self.o_proj = linear(values, width, std / (2 * model.num_layers) ** 0.5)

    @classmethod
    def check(cls, options: Any, model: ModelDims) -> None:
        super().check(options, model)
        cls.check_expansion("expand_v", geometry(options, model)[1], options.expand_v)
        if options.normalize and options.feature_map not in POSITIVE:
            raise RecipeError(
                f"mixer.linear_attention.normalize = true: needs a positive feature_map ({', '.join(POSITIVE)}), "
                f"not '{options.feature_map}'"
            )

    @classmethod
    def num_parameters(cls, options: Any, model: ModelDims) -> int:
        """D (2 H K + 3 H V), V of the norm, W (2 H K + H V) of convolutions."""
        heads, head_dim = geometry(options, model)
        value_dim = expanded(head_dim, options.expand_v)
        weights = model.hidden_size * heads * (2 * head_dim + 3 * value_dim)
        return weights + value_dim + options.conv * heads * (2 * head_dim + value_dim)

    def state_spec(self) -> dict[str, StateSpec]:
        columns = self.value_dim + self.normalize
        return {
            "recurrent": StateSpec((self.heads, self.head_dim, columns), Carry.RECURRENT),
            **self.convs.state_spec(),
        }

    def tensor_parallel(self) -> dict[str, TensorWord]:
        words = {f"{name}.weight": column() for name in ("q_proj", "k_proj", "v_proj", "g_proj")}
        words |= self.convs.tensor_parallel("convs")
        return words | {"norm.weight": REPLICATED_SUMMED, "o_proj.weight": row()}

    def mixing_flops(self, length: int) -> float:
        return linear_recurrence_flops(self.heads, self.head_dim, self.value_dim + self.normalize)

    def project(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Raw q, k [T, H K], v and gate [T, H V]."""
        return self.q_proj(x_TD), self.k_proj(x_TD), self.v_proj(x_TD), self.g_proj(x_TD)

    def features(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mapped q and k, and v with its column of ones where the scores are summed, [T, H, ...]."""
        q, k = (self.phi(x).unflatten(-1, (-1, self.head_dim)) for x in (q, k))
        v = v.unflatten(-1, (-1, self.value_dim))
        if self.normalize:
            v = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], dim=-1)
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, ids: Tensor) -> Tensor:
        """Features, recurrence, norm and output projection of documents that start empty, -> [T, D]."""
        parts = self.convs({"q": q, "k": k, "v": v}, ids)
        q, k, v = self.features(parts["q"], parts["k"], parts["v"])
        o, _ = ops.linear_recurrence(
            q[None], k[None], v[None], scale=self.scale, document_ids=ids, backend=self.backend
        )
        return self.output(o[0], gate)

    def output(self, o: Tensor, gate: Tensor) -> Tensor:
        """[T, H, V (+ 1)], [T, H V] -> [T, D]."""
        if self.normalize:
            o, total = o[..., :-1], o[..., -1:]
            o = o / (total + EPSILON)
        gate = gate.unflatten(-1, (-1, self.value_dim))
        return self.o_proj(self.norm(o, gate).flatten(-2))

    def forward(
        self, x_TD: Tensor, context: Context, state: State | None = None, carried: Carried | None = None
    ) -> tuple[Tensor, State | None, Carried]:
        q, k, v, gate = self.project(x_TD)
        if state is None:
            return self.mix(q, k, v, gate, context.documents.ids), None, carried or {}
        parts, after = self.convs.resume({"q": q, "k": k, "v": v}, context, state)
        q, k, v = self.features(parts["q"], parts["k"], parts["v"])
        o, after["recurrent"] = resume_linear(
            q, k, v, None, context, state["recurrent"], scale=self.scale, backend=self.backend
        )
        return self.output(o, gate), after, carried or {}
