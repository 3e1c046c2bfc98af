"""Gated DeltaNet: the delta rule with a forget gate (Yang et al. 2024, arXiv 2412.06464).

    S'_t = a_t S_{t-1},      S_t = S'_t + b_t k_t (v_t - S'_t^T k_t)^T,      o_t = S_t^T q_t / sqrt(K)
    log a_t = -exp(A_log) softplus(W_a x_t + dt_bias),      b_t = sigmoid(W_b x_t)  [times 2]
    y_t = W_o (RMSNorm(o_t) * swish(W_g x_t))

q, k and v pass a short convolution with SiLU; q and k have unit length per head. A_log and dt_bias, one a value head,
stay in float32 in a module of their own. Values may have more heads than keys (`value_heads`).

Shapes: T tokens, D width, H key heads, HV value heads, K and V key and value width of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import Uniform, linear, set_initializers
from torchlinearmoe.kernels.flops import delta_rule_flops
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
    per_head,
    register,
    row,
)
from torchlinearmoe.mixers.past import Past
from torchlinearmoe.mixers.recurrence import delta_rule
from torchlinearmoe.mixers.tail import Convolutions, GatedHeadNorm


@dataclass(frozen=True, kw_only=True)
class Options(MixerOptions):
    """`[mixer.gated_delta_net]`."""

    value_heads: int = 0
    """Value heads, a multiple of the key heads; 0 for as many."""
    expand_v: float = 2.0
    """Width of a value head as a multiple of the key head's."""
    conv: int = 4
    """Taps of the short convolutions on q, k and v; 0 for none."""
    negative_eigenvalues: bool = False
    """Let b reach 2, so that a transition can flip a direction."""


def _dims(options: Options, model: ModelDims) -> tuple[int, int, int, int]:
    """(key heads, key width, value heads, value width)."""
    heads, head_dim = geometry(options, model)
    return heads, head_dim, options.value_heads or heads, expanded(head_dim, options.expand_v)


class ScalarDecay(nn.Module):
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
            dt_bias=Uniform(math.log(1e-3), math.log(1e-1), _inverse_softplus_of_exp),
        )

    def forward(self, logits: Tensor) -> Tensor:
        """[T, HV] -> log decays [T, HV], at most zero."""
        wide = logits.to(self.A_log.dtype)
        return -self.A_log.exp() * F.softplus(wide + self.dt_bias)


def _inverse_softplus_of_exp(log_dt: Tensor) -> Tensor:
    """x with softplus(x) = exp(log_dt), the step floored at 1e-4."""
    dt = log_dt.exp().clamp(min=1e-4)
    return dt + torch.log(-torch.expm1(-dt))


@register("gated_delta_net")
class GatedDeltaNet(Mixer):
    """Dense transition, short convolutions, float32 decay parameters."""

    transition = Transition.DENSE
    Options = Options
    variants = (
        {"conv": 0, "expand_v": 1.0},
        {"negative_eigenvalues": True, "expand_v": 1.0},
        {"heads": 2, "head_dim": 16, "value_heads": 4, "expand_v": 1.5},
    )
    regions = ("project", "mix")

    def __init__(self, options: Options, model: ModelDims, place: Place) -> None:
        super().__init__()
        self.heads, self.head_dim, self.value_heads, self.value_dim = _dims(options, model)
        self.top = 2.0 if options.negative_eigenvalues else 1.0
        self.backend = model.kernel_backend
        self.scale = self.head_dim**-0.5
        width, std = model.hidden_size, model.init_std
        keys, values = self.heads * self.head_dim, self.value_heads * self.value_dim
        self.q_proj = linear(width, keys, std)
        self.k_proj = linear(width, keys, std)
        self.v_proj = linear(width, values, std)
        self.g_proj = linear(width, values, std)
        self.a_proj = linear(width, self.value_heads, std)
        self.b_proj = linear(width, self.value_heads, std)
        self.convs = Convolutions({"q": keys, "k": keys, "v": values}, options.conv)
        self.decay = ScalarDecay(self.value_heads)
        self.norm = GatedHeadNorm(self.value_dim, model.norm_eps)
        self.o_proj = linear(values, width, std / (2 * model.num_layers) ** 0.5)

    @classmethod
    def check(cls, options: Any, model: ModelDims) -> None:
        super().check(options, model)
        cls.check_expansion("expand_v", geometry(options, model)[1], options.expand_v)
        heads, _, value_heads, _ = _dims(options, model)
        if value_heads % heads:
            raise RecipeError(
                f"mixer.gated_delta_net.value_heads = {value_heads}: must be a multiple of the {heads} key heads"
            )

    @classmethod
    def num_parameters(cls, options: Any, model: ModelDims) -> int:
        """D (2 H K + 3 HV V + 2 HV), W (2 H K + HV V) of convolutions, V of the norm, 2 HV of the decay."""
        heads, head_dim, value_heads, value_dim = _dims(options, model)
        keys, values = heads * head_dim, value_heads * value_dim
        weights = model.hidden_size * (2 * keys + 3 * values + 2 * value_heads)
        return weights + options.conv * (2 * keys + values) + value_dim + 2 * value_heads

    def state_spec(self) -> dict[str, StateSpec]:
        recurrent = StateSpec((self.value_heads, self.head_dim, self.value_dim), Carry.RECURRENT)
        return {"recurrent": recurrent, **self.convs.state_spec()}

    def tensor_parallel(self) -> dict[str, TensorWord]:
        words = {f"{name}_proj.weight": column() for name in "qkvgab"}
        words |= self.convs.tensor_parallel("convs")
        words |= {"decay.A_log": per_head(), "decay.dt_bias": per_head()}
        return words | {"norm.weight": REPLICATED_SUMMED, "o_proj.weight": row()}

    def mixing_flops(self, length: int) -> float:
        return delta_rule_flops(self.value_heads, self.head_dim, self.value_dim)

    def project(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Raw q, k [T, H K], v and gate [T, HV V], decay logits [T, HV], b [T, HV] in float32."""
        b = self.b_proj(x_TD)
        beta = torch.sigmoid(b if b.dtype == torch.float64 else b.float()) * self.top
        return self.q_proj(x_TD), self.k_proj(x_TD), self.v_proj(x_TD), self.g_proj(x_TD), self.a_proj(x_TD), beta

    def mix(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, log_decay: Tensor, beta: Tensor, past: Past) -> Tensor:
        """Convolutions, recurrence, norm and output projection, -> [T, D]."""
        parts = self.convs({"q": q, "k": k, "v": v}, past)
        q, k, v = self.heads_of(parts["q"], parts["k"], parts["v"])
        o = delta_rule(q, k, v, beta, log_decay, past, scale=self.scale, backend=self.backend)
        return self.output(o, gate)

    def heads_of(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, H K] x 2, [T, HV V] -> [T, H, K] x 2, [T, HV, V]."""
        q, k = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k))
        return q, k, v.unflatten(-1, (-1, self.value_dim))

    def output(self, o: Tensor, gate: Tensor) -> Tensor:
        """[T, HV, V], [T, HV V] -> [T, D]."""
        return self.o_proj(self.norm(o, gate.unflatten(-1, (-1, self.value_dim))).flatten(-2))

    def forward(
        self, x_TD: Tensor, context: Context, state: State | None = None, carried: Carried | None = None
    ) -> tuple[Tensor, State | None, Carried]:
        past = context.past(state)
        q, k, v, gate, a, beta = self.project(x_TD)
        log_decay = self.decay(a)
        return self.region("mix", past)(q, k, v, gate, log_decay, beta, past), past.after, carried or {}
