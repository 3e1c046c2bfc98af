"""HGRN2: a gated linear recurrence whose key is one minus its forget gate (Qin et al. 2024, arXiv 2404.07904).

    f_t = gamma_l + (1 - gamma_l) sigmoid(W_f x_t)
    S_t = diag(f_t) S_{t-1} + (1 - f_t) i_t^T,      i_t = W_i x_t
    o_t = W_o RMSNorm(S_t^T swish(W_q x_t) / sqrt(K))

gamma_l are learned lower bounds that grow with depth: a table over the HGRN2 layers, softmax over the layers, summed
from the second layer up to this one, so that the first layer's bound is zero. The norm spans the full width.

Shapes: T tokens, D width, H heads of K = V, N documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Shard

from torchlinearmoe.initialize import ZEROS, linear, set_initializers
from torchlinearmoe.kernels.choose import KernelCall
from torchlinearmoe.kernels.linear import OPERATOR, linear_recurrence_flops
from torchlinearmoe.kernels.operator import Call
from torchlinearmoe.layers.convolution import Convolutions
from torchlinearmoe.layers.past import After, Past
from torchlinearmoe.mixers.base import (
    Carry,
    Context,
    LayerPlace,
    SharedModule,
    StateSpec,
    geometry,
    register,
)
from torchlinearmoe.mixers.linear_mixer import LinearMixer, Parts
from torchlinearmoe.mixers.output import NormedOutput
from torchlinearmoe.mixers.recurrence import linear_recurrence
from torchlinearmoe.precision import in_float32
from torchlinearmoe.recipe.schema import ModelRecipe


@dataclass(frozen=True, kw_only=True)
class Options(NormedOutput):
    """`[mixer.hgrn2]`; the width of a head is the paper's expansion ratio."""

    lower_bounds: bool = True
    """Learn a lower bound of the forget gate for every layer; false lets every gate reach zero."""
    conv: int = 0
    """Taps of a short convolution on q, f and i, without an activation of its own; 0 for none."""


class LowerBounds(SharedModule):
    """The table of lower bounds over the HGRN2 layers, kept and computed in float32."""

    keep_fp32 = True
    no_weight_decay = ("table",)

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(layers, width))
        set_initializers(self, table=ZEROS)

    def tensor_parallel(self) -> dict[str, Placement]:
        return {"table": Shard(1)}

    def forward(self) -> Tensor:
        """Lower bound of every layer and channel, [layers, H K], in [0, 1)."""
        shares = self.table.softmax(0)
        # The first row is a plain zero: the gradient by a first layer's bound, up to e^60, never meets the others'.
        return F.pad(shares[1:].cumsum(0), (0, 0, 1, 0))


def forget_gate(logits: Tensor, bound: Tensor | None) -> tuple[Tensor, Tensor]:
    """log f and the key 1 - f of f = gamma + (1 - gamma) sigmoid(logits), in float32 (float64 stays).

    logits: [..., C]; bound: gamma [C] or None for zero. Written as f = sigmoid(x) (1 + gamma e^-x), which is exact and
    has finite gradients for gamma = 0 too; logits below -60, where a zero-bound gate is e^-60, are held there.
    """
    x = in_float32(logits).clamp(min=-60.0)
    if bound is None:
        return F.logsigmoid(x), torch.sigmoid(-x)
    gamma = bound.to(x.dtype)
    return F.logsigmoid(x) + torch.log1p(gamma * torch.exp(-x)), (1 - gamma) * torch.sigmoid(-x)


@register("hgrn2")
class HGRN2(LinearMixer[Options]):
    """Diagonal decay, key tied to the gate, learned lower bounds."""

    projections = {"q": "q_proj", "v": "i_proj", "o": "o_proj"}
    Options = Options
    variants = ({"conv": 4}, {"lower_bounds": False}, {"heads": 3, "head_dim": 16}, {"output_norm": "none"})
    float8 = ("q_proj", "i_proj", "o_proj")
    reads = {"q": ("q_proj",)}
    writes = {"f": ("f_proj",), "i": ("i_proj",)}

    def __init__(self, options: Options, model: ModelRecipe, place: LayerPlace) -> None:
        super().__init__(options, model, place)
        self.heads, self.head_dim = geometry(options, model)
        self.ordinal = place.ordinal
        self.bounded = options.lower_bounds
        self.backend = model.kernel_backend
        self.scale = self.head_dim**-0.5
        inner, width, std = self.heads * self.head_dim, model.hidden_size, model.init_std
        self.q_proj = linear(width, inner, std)
        self.f_proj = linear(width, inner, std)
        self.i_proj = linear(width, inner, std)
        self.convs = Convolutions({"q": inner, "f": inner, "i": inner}, options.conv, activation=None)
        self.norm = options.norm(inner, model)
        self.o_proj = linear(inner, width, std / (2 * model.num_layers) ** 0.5)

    @classmethod
    def shared_module(cls, options: Options, model: ModelRecipe, count: int) -> SharedModule | None:
        heads, head_dim = geometry(options, model)
        return LowerBounds(count, heads * head_dim) if options.lower_bounds else None

    def state_spec(self) -> dict[str, StateSpec]:
        recurrent = StateSpec((self.heads, self.head_dim, self.head_dim), Carry.RECURRENT)
        return {"recurrent": recurrent, **self.convs.state_spec()}

    def tensor_parallel(self) -> dict[str, Placement]:
        placements = {f"{name}.weight": Shard(0) for name in ("q_proj", "f_proj", "i_proj")}
        placements |= self.convs.tensor_parallel("convs")
        placements |= {f"norm.{name}": Shard(0) for name, _ in self.norm.named_parameters()}
        return placements | {"o_proj.weight": Shard(1)}

    def kernel_calls(self, device: str, dtype: torch.dtype) -> Iterator[KernelCall]:
        yield OPERATOR, self.backend, Call("diagonal", device, dtype, self.head_dim)

    def mixing_flops(self, length: int) -> float:
        return linear_recurrence_flops(self.heads, self.head_dim, self.head_dim)

    def gates(self, q: Tensor, f: Tensor, i: Tensor, bound: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values and float32 log decays, [T, H, K] each."""
        log_decay, k = forget_gate(f, bound)
        heads = (self.heads_of(part) for part in (F.silu(q), k.to(q.dtype), i, log_decay))
        q, k, v, log_decay = heads
        return q, k, v, log_decay

    def prepare(self, parts: Parts, context: Context) -> Parts:
        bound = context.shared[self.name][self.ordinal] if self.bounded else None
        return {**parts, "bound": bound}

    def read(self, parts: Parts, past: Past) -> tuple[Tensor, After]:
        convolved, after = self.convs({name: parts[name] for name in "qfi"}, past)
        state = past.state.get("recurrent")
        q, k, v, log_decay = self.gates(convolved["q"], convolved["f"], convolved["i"], parts["bound"])
        o, after["recurrent"] = linear_recurrence(
            q, k, v, log_decay, past, state, scale=self.scale, backend=self.backend
        )
        return o, after

    def output(self, o: Tensor) -> Tensor:
        """[T, H, V] -> [T, D]."""
        return self.o_proj(self.norm(o.flatten(-2)))

    def heads_of(self, x: Tensor) -> Tensor:
        """[T, H K] -> [T, H, K]; the head count is read from the shape."""
        return x.unflatten(-1, (-1, self.head_dim))
