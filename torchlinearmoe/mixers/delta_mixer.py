"""What the delta-rule mixers share: the whole layer but its decay, its output norm and its output gate.

    S'_t = diag(a_t) S_{t-1},      S_t = S'_t + b_t k_t (v_t - S'_t^T k_t)^T,      o_t = S_t^T q_t / sqrt(K)
    b_t = sigmoid(W_b x_t)  [times 2]

q, k and v pass a short convolution with SiLU, or SiLU alone without taps; q and k then have unit length per head.
Values may have more heads than keys (`value_heads`). With b_t up to 1 no eigenvalue of the transition is negative; up
to 2 it can flip a direction (Grazzi et al. 2024, arXiv 2411.12537).

Shapes: T tokens, D width, H key heads, HV value heads, K and V key and value width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import linear
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
    row,
)
from torchlinearmoe.mixers.past import Past
from torchlinearmoe.mixers.recurrence import delta_rule
from torchlinearmoe.mixers.tail import Convolutions, in_float32


@dataclass(frozen=True, kw_only=True)
class DeltaOptions(MixerOptions):
    """Options of every delta-rule mixer."""

    value_heads: int = 0
    """Value heads, a multiple of the key heads; 0 for as many."""
    expand_v: float = 1.0
    """Width of a value head as a multiple of a head's width."""
    conv: int = 4
    """Taps of the short convolutions on q, k and v; 0 for none."""
    negative_eigenvalues: bool = False
    """Let b reach 2, so that a transition can flip a direction."""


class DeltaMixer(Mixer):
    """Projections, short convolutions, the delta rule and the way out.

    A subclass builds `norm`, `decay` (None: nothing decays) and what `project_gate` and `project_decay` need.
    """

    transition = Transition.DENSE
    Options = DeltaOptions
    regions = ("project", "mix")
    norm: nn.Module
    decay: nn.Module | None

    def __init__(self, options: DeltaOptions, model: ModelDims, place: Place) -> None:
        super().__init__()
        self.heads, self.key_dim, self.value_heads, self.value_dim = self.dims(options, model)
        self.top = 2.0 if options.negative_eigenvalues else 1.0
        self.backend = model.kernel_backend
        self.scale = self.key_dim**-0.5
        width, std = model.hidden_size, model.init_std
        keys, values = self.heads * self.key_dim, self.value_heads * self.value_dim
        self.q_proj = linear(width, keys, std)
        self.k_proj = linear(width, keys, std)
        self.v_proj = linear(width, values, std)
        self.b_proj = linear(width, self.value_heads, std)
        self.convs = Convolutions({"q": keys, "k": keys, "v": values}, options.conv, always_activate=True)
        self.o_proj = linear(values, width, std / (2 * model.num_layers) ** 0.5)

    @classmethod
    def dims(cls, options: Any, model: ModelDims) -> tuple[int, int, int, int]:
        """(key heads, key width, value heads, value width)."""
        heads, width = geometry(options, model)
        return heads, width, options.value_heads or heads, expanded(width, options.expand_v)

    @classmethod
    def check(cls, options: Any, model: ModelDims) -> None:
        super().check(options, model)
        heads, width = geometry(options, model)
        cls.check_expansion("expand_v", width, options.expand_v)
        if options.value_heads % heads:
            raise RecipeError(
                f"mixer.{cls.name}.value_heads = {options.value_heads}: must be a multiple of the {heads} key heads"
            )

    @classmethod
    def num_parameters(cls, options: Any, model: ModelDims) -> int:
        """D (2 H K + 2 HV V + HV), W (2 H K + HV V) of convolutions, V of the norm; a subclass adds its own."""
        heads, key_dim, value_heads, value_dim = cls.dims(options, model)
        keys, values = heads * key_dim, value_heads * value_dim
        weights = model.hidden_size * (2 * keys + 2 * values + value_heads)
        return weights + options.conv * (2 * keys + values) + value_dim

    def state_spec(self) -> dict[str, StateSpec]:
        recurrent = StateSpec((self.value_heads, self.key_dim, self.value_dim), Carry.RECURRENT)
        return {"recurrent": recurrent, **self.convs.state_spec()}

    def tensor_parallel(self) -> dict[str, TensorWord]:
        words = {f"{name}_proj.weight": column() for name in "qkvb"} | self.convs.tensor_parallel("convs")
        return words | {"norm.weight": REPLICATED_SUMMED, "o_proj.weight": row()}

    def mixing_flops(self, length: int) -> float:
        return delta_rule_flops(self.value_heads, self.key_dim, self.value_dim)

    def project_gate(self, x_TD: Tensor) -> Tensor | None:
        """The argument of the output gate, [T, HV V]."""
        return None

    def project_decay(self, x_TD: Tensor) -> Tensor | None:
        """What `decay` makes log decays of."""
        return None

    def project(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Raw q, k [T, H K] and v [T, HV V], b [T, HV] in float32, decay logits, gate."""
        beta = torch.sigmoid(in_float32(self.b_proj(x_TD))) * self.top
        q, k, v = self.q_proj(x_TD), self.k_proj(x_TD), self.v_proj(x_TD)
        return q, k, v, beta, self.project_decay(x_TD), self.project_gate(x_TD)

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, gate: Tensor | None, past: Past
    ) -> Tensor:
        """Convolutions, recurrence, norm, gate and output projection, -> [T, D]."""
        parts = self.convs({"q": q, "k": k, "v": v}, past)
        q, k = (parts[name].unflatten(-1, (-1, self.key_dim)) for name in "qk")
        v = parts["v"].unflatten(-1, (-1, self.value_dim))
        o = delta_rule(q, k, v, beta, log_decay, past, scale=self.scale, backend=self.backend)
        o = self.norm(o) if gate is None else self.norm(o, gate.unflatten(-1, (-1, self.value_dim)))
        return self.o_proj(o.flatten(-2))

    def forward(
        self, x_TD: Tensor, context: Context, state: State | None = None, carried: Carried | None = None
    ) -> tuple[Tensor, State | None, Carried]:
        past = context.past(state)
        q, k, v, beta, logits, gate = self.project(x_TD)
        log_decay = None if self.decay is None else self.decay(logits)
        return self.region("mix", past)(q, k, v, beta, log_decay, gate, past), past.after, carried or {}
