"""What Based and Rebased share: linear attention whose score is a quadratic polynomial of narrow queries and keys.

    o_t = sum_{j <= t} f(q_t . k_j) v_j / sum_{j <= t} f(q_t . k_j)
    y_t = W_o o_t      [W_o (o_t * swish(W_g x_t))]

f(q . k) is an inner product of second-order features, so the state has a row for every feature: with 16 channels 153
or 136 rows for V values and the denominator. This file registers nothing; `based.py` and `rebased.py` say what f is.

Shapes: T tokens, D width, H heads, K query and key width of a head, V value width, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import Placement, Shard

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import linear
from torchlinearmoe.kernels.choose import KernelCall
from torchlinearmoe.kernels.operator import Call
from torchlinearmoe.kernels.quadratic import OPERATOR, quadratic_attention_flops
from torchlinearmoe.kernels.quadratic.features import feature_width
from torchlinearmoe.layers.convolution import Convolutions
from torchlinearmoe.layers.past import After, Past
from torchlinearmoe.mixers.base import (
    Carry,
    Context,
    LayerPlace,
    Mixer,
    MixerOptions,
    StateSpec,
    geometry,
)
from torchlinearmoe.mixers.recurrence import quadratic_attention
from torchlinearmoe.recipe.schema import ModelRecipe


@dataclass(frozen=True, kw_only=True)
class QuadraticOptions(MixerOptions):
    """Options common to Based and Rebased; `head_dim` is the width of a value head."""

    feature_dim: int = 16
    """Width of a query and key head; the state has about half its square rows."""
    conv: int = 0
    """Taps of a short convolution on q, k and v; 0 for none."""
    gate: bool = False
    """Multiply the output by swish(W_g x)."""


Q = TypeVar("Q", bound=QuadraticOptions)


class QuadraticAttention(Mixer[Q]):
    """Identity transition on second-order features; normalised scores."""

    float8 = ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj")
    regions = ("project", "mix")
    kind: ClassVar[str]
    """The polynomial, as in `kernels.quadratic.quadratic_attention`."""
    epsilon: ClassVar[float]
    """Added to the denominator."""

    def __init__(self, options: Q, model: ModelRecipe, place: LayerPlace) -> None:
        super().__init__(options, model, place)
        self.heads, self.value_dim = geometry(options, model)
        self.feature_dim = options.feature_dim
        self.backend = model.kernel_backend
        width, std = model.hidden_size, model.init_std
        keys, values = self.heads * self.feature_dim, self.heads * self.value_dim
        self.q_proj = linear(width, keys, std)
        self.k_proj = linear(width, keys, std)
        self.v_proj = linear(width, values, std)
        self.g_proj = linear(width, values, std) if options.gate else None
        self.convs = Convolutions({"q": keys, "k": keys, "v": values}, options.conv)
        self.o_proj = linear(values, width, std / (2 * model.num_layers) ** 0.5)

    @classmethod
    def check(cls, options: Q, model: ModelRecipe) -> None:
        super().check(options, model)
        if not options.feature_dim:
            raise RecipeError(f"mixer.{cls.name}.feature_dim = 0: must be at least 1")

    def state_spec(self) -> dict[str, StateSpec]:
        rows = feature_width(self.kind, self.feature_dim)
        recurrent = StateSpec((self.heads, rows, self.value_dim + 1), Carry.RECURRENT)
        return {"recurrent": recurrent, **self.convs.state_spec()}

    def tensor_parallel(self) -> dict[str, Placement]:
        names = ("q_proj", "k_proj", "v_proj") if self.g_proj is None else ("q_proj", "k_proj", "v_proj", "g_proj")
        placements = {f"{name}.weight": Shard(0) for name in names}
        return placements | self.convs.tensor_parallel("convs") | {"o_proj.weight": Shard(1)}

    def kernel_calls(self, device: str, dtype: torch.dtype) -> Iterator[KernelCall]:
        yield OPERATOR, self.backend, Call(self.kind, device, dtype, self.feature_dim)

    def mixing_flops(self, length: int) -> float:
        rows = feature_width(self.kind, self.feature_dim)
        return quadratic_attention_flops(self.heads, self.feature_dim, rows, self.value_dim + 1)

    def project(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Raw q and k [T, H K], v and, where there is one, the gate [T, H V]."""
        gate = None if self.g_proj is None else self.g_proj(x_TD)
        return self.q_proj(x_TD), self.k_proj(x_TD), self.v_proj(x_TD), gate

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """What happens to the queries and keys [T, H, K] before the polynomial."""
        return q, k

    def heads_of(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, H K] x 2, [T, H V] -> prepared [T, H, K] x 2, [T, H, V]."""
        q, k = self.prepare(*(x.unflatten(-1, (-1, self.feature_dim)) for x in (q, k)))
        return q, k, v.unflatten(-1, (-1, self.value_dim))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, past: Past) -> tuple[Tensor, After]:
        """Convolutions, attention and output projection, -> [T, D]."""
        parts, after = self.convs({"q": q, "k": k, "v": v}, past)
        q, k, v = self.heads_of(parts["q"], parts["k"], parts["v"])
        state = past.state.get("recurrent")
        o, after["recurrent"] = quadratic_attention(
            q, k, v, past, state, kind=self.kind, eps=self.epsilon, backend=self.backend
        )
        return self.output(o, gate), after

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        """[T, H, V], [T, H V] -> [T, D]."""
        o = o.flatten(-2)
        return self.o_proj(o if gate is None else o * F.silu(gate))

    def run(self, x_TD: Tensor, context: Context, past: Past) -> tuple[Tensor, After]:
        q, k, v, gate = self.project(x_TD)
        return self.region("mix", past)(q, k, v, gate, past)
