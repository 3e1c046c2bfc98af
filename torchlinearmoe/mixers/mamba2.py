"""Mamba2, the state space dual (Dao and Gu 2024, arXiv 2405.21060).

    dt_t = softplus(W_dt x_t + dt_bias),      a_t = exp(-dt_t exp(A_log))
    S_t = a_t S_{t-1} + B_t (dt_t u_t)^T,     o_t = S_t^T C_t + D u_t
    y_t = W_o RMSNorm(o_t * swish(W_z x_t))

u = W_x x, B = W_b x and C = W_c x pass a short convolution with bias, then SiLU. It is a linear recurrence with C as
queries, B as keys and dt u as values. B and C are shared by the heads of a group; the norm, after the gate, spans a
group's heads (all heads for one group). A_log, dt_bias and D, one of each a head, stay in float32 in a module of
their own.

Shapes: T tokens, M model width (D is a parameter here), H heads of P channels, H P = `expand` M, G groups, N state
width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import ONES, Uniform, inverse_softplus_of_exp, linear, set_initializers
from torchlinearmoe.kernels.choose import KernelCall
from torchlinearmoe.kernels.linear import linear_recurrence_flops
from torchlinearmoe.kernels.operator import Call
from torchlinearmoe.kernels.ssd import OPERATOR
from torchlinearmoe.layers.convolution import Convolutions
from torchlinearmoe.layers.norm import GroupedRMSNorm, RMSNorm
from torchlinearmoe.layers.past import After, Past
from torchlinearmoe.mixers.base import (
    Carry,
    Context,
    LayerPlace,
    Mixer,
    MixerOptions,
    StateSpec,
    expanded,
    register,
)
from torchlinearmoe.mixers.recurrence import ssd
from torchlinearmoe.module import Module
from torchlinearmoe.precision import in_float32
from torchlinearmoe.recipe.schema import ModelRecipe

HEAD_DIM = 64
"""The paper's width of a head, P."""


@dataclass(frozen=True, kw_only=True)
class Options(MixerOptions):
    """`[mixer.mamba2]`; `heads` times `head_dim` is the inner width; `head_dim` 0 is 64 unless `heads` is set."""

    expand: float = 2.0
    """Inner width as a multiple of the model's."""
    state: int = 128
    """State width, N: entries that each channel remembers."""
    groups: int = 1
    """Groups of heads that share B and C, a divisor of the heads."""
    conv: int = 4
    """Taps of the short convolutions, with bias, on x, B and C in front of their SiLU; 0 for none."""


def _dims(options: Options, model: ModelRecipe) -> tuple[int, int]:
    """(heads, head width)."""
    inner = expanded(model.hidden_size, options.expand)
    head_dim = options.head_dim or (inner // options.heads if options.heads else HEAD_DIM)
    return options.heads or inner // head_dim, head_dim


class StepDecay(Module):
    """Step sizes, log decays and skip weights, kept and computed in float32."""

    keep_fp32 = True
    no_weight_decay = ("A_log", "dt_bias", "D")

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        set_initializers(
            self,
            A_log=Uniform(1.0, 16.0, torch.log),
            dt_bias=Uniform(math.log(1e-3), math.log(1e-1), inverse_softplus_of_exp),
            D=ONES,
        )

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, H] -> dt [T, H], A [H], below zero, and D [H]."""
        dt = F.softplus(logits.to(self.A_log.dtype) + self.dt_bias)
        # A copy: parameters gathered for this module are freed when it returns.
        return dt, -self.A_log.exp(), self.D.clone()


@register("mamba2")
class Mamba2(Mixer[Options]):
    """Scalar decay from a step size; skip connection; norm after the gate."""

    projections = {"q": "c_proj", "k": "b_proj", "v": "x_proj", "o": "o_proj"}
    Options = Options
    variants = (
        {"head_dim": 16, "groups": 2, "state": 24},
        {"conv": 0, "expand": 1.5, "heads": 3, "head_dim": 32, "state": 16},
        {"heads": 4, "groups": 4, "conv": 2, "state": 40},
    )
    float8 = ("z_proj", "x_proj", "b_proj", "c_proj", "o_proj")
    regions = ("project", "mix")

    def __init__(self, options: Options, model: ModelRecipe, place: LayerPlace) -> None:
        super().__init__(options, model, place)
        self.heads, self.head_dim = _dims(options, model)
        self.groups, self.state = options.groups, options.state
        self.backend = model.kernel_backend
        width, std = model.hidden_size, model.init_std
        inner, shared = self.heads * self.head_dim, self.groups * self.state
        self.z_proj = linear(width, inner, std)
        self.x_proj = linear(width, inner, std)
        self.b_proj = linear(width, shared, std)
        self.c_proj = linear(width, shared, std)
        self.dt_proj = linear(width, self.heads, std)
        self.convs = Convolutions({"x": inner, "b": shared, "c": shared}, options.conv, bias=True, always_activate=True)
        self.decay = StepDecay(self.heads)
        eps = model.norm_eps
        self.norm = RMSNorm(inner, eps) if self.groups == 1 else GroupedRMSNorm(inner, self.groups, eps)
        self.o_proj = linear(inner, width, std / (2 * model.num_layers) ** 0.5)

    @classmethod
    def check(cls, options: Options, model: ModelRecipe) -> None:
        cls.check_counts(options)
        cls.check_expansion("expand", model.hidden_size, options.expand)
        inner = expanded(model.hidden_size, options.expand)
        heads, head_dim = _dims(options, model)
        if heads < 1 or head_dim < 1 or heads * head_dim != inner:
            raise RecipeError(
                f"mixer.mamba2.heads: {heads} heads of {head_dim} do not make mixer.mamba2.expand * model.hidden_size "
                f"= {inner}; give mixer.mamba2.heads or mixer.mamba2.head_dim"
            )
        if options.groups < 1 or heads % options.groups:
            raise RecipeError(f"mixer.mamba2.groups = {options.groups}: must divide the {heads} heads")
        if options.state < 1:
            raise RecipeError(f"mixer.mamba2.state = {options.state}: must be at least 1")

    @classmethod
    def head_groups(cls, options: Options, model: ModelRecipe) -> tuple[str, int]:
        """A single group's B and C are on every rank."""
        return ("heads", _dims(options, model)[0]) if options.groups == 1 else ("groups", options.groups)

    def state_spec(self) -> dict[str, StateSpec]:
        recurrent = StateSpec((self.heads, self.state, self.head_dim), Carry.RECURRENT)
        return {"recurrent": recurrent, **self.convs.state_spec()}

    def tensor_parallel(self) -> dict[str, Placement]:
        """Groups split with their heads; B and C of a single group are on every rank."""
        placements = {f"{name}_proj.weight": Shard(0) for name in ("z", "x", "b", "c", "dt")}
        placements |= self.convs.tensor_parallel("convs")
        placements |= {f"decay.{name}": Shard(0) for name in ("A_log", "dt_bias", "D")}
        if self.groups == 1:
            placements |= {
                name: Replicate() for name in placements if name.startswith(("b_", "c_", "convs.b", "convs.c"))
            }
        return placements | {"norm.weight": Shard(0), "o_proj.weight": Shard(1)}

    def kernel_calls(self, device: str, dtype: torch.dtype) -> Iterator[KernelCall]:
        yield OPERATOR, self.backend, Call("ssd", device, dtype, self.state)

    def mixing_flops(self, length: int) -> float:
        return linear_recurrence_flops(self.heads, self.state, self.head_dim)

    def project(self, x_TM: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gate z and u [T, H P], B and C [T, G N] before their convolutions, step logits [T, H]."""
        return self.z_proj(x_TM), self.x_proj(x_TM), self.b_proj(x_TM), self.c_proj(x_TM), self.dt_proj(x_TM)

    def mix(
        self,
        z: Tensor,
        u: Tensor,
        b: Tensor,
        c: Tensor,
        dt: Tensor,
        A: Tensor,
        skip: Tensor,
        past: Past,
    ) -> tuple[Tensor, After]:
        """Convolutions, recurrence, norm and output projection, -> [T, M]; head counts are read from the shapes."""
        parts, after = self.convs({"x": u, "b": b, "c": c}, past)
        u = parts["x"].unflatten(-1, (-1, self.head_dim))
        b, c = (parts[name].unflatten(-1, (-1, self.state)) for name in "bc")
        o, after["recurrent"] = ssd(u, dt, A, b, c, past, past.state.get("recurrent"), backend=self.backend)
        return self.output(o, u, skip, z), after

    def output(self, o: Tensor, u: Tensor, skip: Tensor, z: Tensor) -> Tensor:
        """o, u: [T, H, P]; skip: [H]; z: [T, H P] -> [T, M]; up to the norm in float32."""
        wide = in_float32(o) + skip[:, None] * in_float32(u)
        gated = wide.flatten(-2) * F.silu(in_float32(z))
        return self.o_proj(self.norm(gated).to(z.dtype))

    def run(self, x_TD: Tensor, context: Context, past: Past) -> tuple[Tensor, After]:
        z, u, b, c, logits = self.project(x_TD)
        return self.region("mix", past)(z, u, b, c, *self.decay(logits), past)
