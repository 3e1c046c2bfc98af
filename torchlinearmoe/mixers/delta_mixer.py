"""What the delta-rule mixers share: the whole layer but its decay, its output norm and its output gate.

    S'_t = diag(a_t) S_{t-1},      S_t = S'_t + b_t k_t (v_t - S'_t^T k_t)^T,      o_t = S_t^T q_t / sqrt(K)
    b_t = sigmoid(W_b x_t)  [times 2]

q, k and v pass a short convolution with SiLU, or SiLU alone without taps; q and k then have unit length per head.
Values may have more heads than keys (`value_heads`). With b_t up to 1 no eigenvalue of the transition is negative; up
to 2 it can flip a direction (Grazzi et al. 2024, arXiv 2411.12537).

Shapes: T tokens, D width, H key heads, HV value heads, K and V key and value width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import linear
from torchlinearmoe.kernels.choose import KernelCall
from torchlinearmoe.kernels.delta import OPERATOR, delta_rule_flops
from torchlinearmoe.kernels.operator import Call
from torchlinearmoe.layers.convolution import Convolutions
from torchlinearmoe.layers.past import After, Past
from torchlinearmoe.mixers.base import (
    Carry,
    Context,
    LayerPlace,
    StateSpec,
    expanded,
    geometry,
)
from torchlinearmoe.mixers.linear_mixer import LinearMixer, Parts
from torchlinearmoe.mixers.output import GatedOutput
from torchlinearmoe.mixers.recurrence import delta_rule
from torchlinearmoe.precision import in_float32
from torchlinearmoe.recipe.schema import ModelRecipe


@dataclass(frozen=True, kw_only=True)
class DeltaOptions(GatedOutput):
    """Options of every delta-rule mixer."""

    value_heads: int = 0
    """Value heads, a multiple of the key heads; 0 for as many."""
    expand_v: float = 1.0
    """Width of a value head as a multiple of a head's width."""
    conv: int = 4
    """Taps of the short convolutions on q, k and v; 0 for none."""
    negative_eigenvalues: bool = False
    """Let b reach 2, so that a transition can flip a direction."""


D = TypeVar("D", bound=DeltaOptions)


class DeltaMixer(LinearMixer[D]):
    """Projections, short convolutions, the delta rule and the way out.

    A subclass builds `norm`, `decay` (None: nothing decays) and the layers of the parts `gate` and `decay`.
    """

    Options = DeltaOptions
    float8 = ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj")
    reads = {"q": ("q_proj",), "gate": ("g_proj",)}
    writes = {"k": ("k_proj",), "v": ("v_proj",), "b": ("b_proj",)}
    norm: nn.Module
    decay: nn.Module | None
    gate_kind: ClassVar[str]
    """Of the decay, as in `kernels.delta.kinds`."""

    def __init__(self, options: D, model: ModelRecipe, place: LayerPlace) -> None:
        super().__init__(options, model, place)
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
    def dims(cls, options: D, model: ModelRecipe) -> tuple[int, int, int, int]:
        """(key heads, key width, value heads, value width)."""
        heads, width = geometry(options, model)
        return heads, width, options.value_heads or heads, expanded(width, options.expand_v)

    @classmethod
    def check(cls, options: D, model: ModelRecipe) -> None:
        super().check(options, model)
        heads, width = geometry(options, model)
        cls.check_expansion("expand_v", width, options.expand_v)
        if options.value_heads % heads:
            raise RecipeError(
                f"mixer.{cls.name}.value_heads = {options.value_heads}: must be a multiple of the {heads} key heads"
            )

    def state_spec(self) -> dict[str, StateSpec]:
        recurrent = StateSpec((self.value_heads, self.key_dim, self.value_dim), Carry.RECURRENT)
        return {"recurrent": recurrent, **self.convs.state_spec()}

    def tensor_parallel(self) -> dict[str, Placement]:
        placements = {f"{name}_proj.weight": Shard(0) for name in "qkvb"} | self.convs.tensor_parallel("convs")
        placements |= {f"norm.{name}": Replicate() for name, _ in self.norm.named_parameters()}
        return placements | {"o_proj.weight": Shard(1)}

    def kernel_calls(self, device: str, dtype: torch.dtype) -> Iterator[KernelCall]:
        yield OPERATOR, self.backend, Call(self.gate_kind, device, dtype, self.key_dim)

    def mixing_flops(self, length: int) -> float:
        return delta_rule_flops(self.value_heads, self.key_dim, self.value_dim)

    def prepare(self, parts: Parts, context: Context) -> Parts:
        return parts if self.decay is None else {**parts, "decay": self.decay(parts["decay"])}

    def strength(self, logits: Tensor) -> Tensor:
        """b in float32."""
        return torch.sigmoid(in_float32(logits)) * self.top

    def read(self, parts: Parts, past: Past) -> tuple[Tensor, After]:
        beta = self.strength(parts["b"])
        convolved, after = self.convs({name: parts[name] for name in "qkv"}, past)
        state = past.state.get("recurrent")
        q, k = (convolved[name].unflatten(-1, (-1, self.key_dim)) for name in "qk")
        v = convolved["v"].unflatten(-1, (-1, self.value_dim))
        decay = parts.get("decay")
        o, after["recurrent"] = delta_rule(q, k, v, beta, decay, past, state, scale=self.scale, backend=self.backend)
        return o, after

    def output(self, o: Tensor, *reads: Tensor) -> Tensor:
        """[T, HV, V], [T, HV V] where there is a gate -> [T, D]."""
        return self.o_proj(self.norm(o, *(gate.unflatten(-1, (-1, self.value_dim)) for gate in reads)).flatten(-2))
