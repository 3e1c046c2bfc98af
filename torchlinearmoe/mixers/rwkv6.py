"""RWKV6 (Finch), time mixing: a diagonal recurrence with data-dependent decay and token shift (Peng et al. 2024).

arXiv 2404.05892, equations 11 to 20. x'_t is the token before x_t in the same document, d_t = x'_t - x_t:

    z_t = tanh(W_1 (x_t + mu_x * d_t))                               five low-rank vectors, one for each of r w k v g
    x^i_t = x_t + (mu_i + z^i_t W_2^i) * d_t                         i = w, k, v, r, g
    r_t, k_t, v_t = W_r x^r_t, W_k x^k_t, W_v x^v_t
    log a_t = -exp(w_0 + W_d tanh(W_c x^w_t))                        per channel, in float32
    S_t = diag(a_t) S_{t-1} + k_t v_t^T,       o_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t
    y_t = W_o (GroupNorm(o_t) * swish(W_g x^g_t))                    a group is a head, eps 64e-5

The state is S and the last input. w_0 and u stay in float32 in a module of their own. Initial values are those of the
authors' training code (RWKV-LM, `RWKV-v5/src/model.py`): orthogonal projections and ramps over channels that depend on
the layer's depth (see `_Recipe`), but for W_o, which starts as in every other mixer where theirs is zero.

Shapes: T tokens, D width, H heads of K = V, R rank of a mix, N documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import ZEROS, Rows, Uniform, linear, orthogonal, set_initializers
from torchlinearmoe.kernels.choose import KernelCall
from torchlinearmoe.kernels.linear import OPERATOR, linear_recurrence_flops
from torchlinearmoe.kernels.operator import Call
from torchlinearmoe.layers.convolution import token_shift
from torchlinearmoe.layers.past import After, Past
from torchlinearmoe.mixers.base import (
    Carry,
    Context,
    LayerPlace,
    Mixer,
    MixerOptions,
    StateSpec,
    geometry,
    register,
)
from torchlinearmoe.mixers.recurrence import linear_recurrence
from torchlinearmoe.mixers.rwkv import Depth, HeadGroupNorm
from torchlinearmoe.module import Module
from torchlinearmoe.recipe.schema import ModelRecipe

MIXES = "wkvrg"
"""The five inputs that each have a mix of their own, in the order of W_1's and W_2's blocks."""
HIGHEST_LOGIT = 5.0
"""A decay logit is held here: e^(-e^5) is 0 in float32 already, and e^logit must not overflow."""


@dataclass(frozen=True, kw_only=True)
class Options(MixerOptions):
    """`[mixer.rwkv6]`."""

    mix_rank: int = 32
    """Rank of the data-dependent part of a token's mix with the one before."""
    decay_rank: int = 64
    """Rank of the data-dependent part of the decay."""


class _Recipe(Depth):
    """The authors' initial values; n counts channels."""

    def mix(self, name: str, width: int) -> Rows:
        """mu: 1 - (n / D)^falling; v mixes less of the token before in deep layers, r and g in every layer."""
        return self.ramp(width, 0.5 if name in "rg" else 1.0, 0.3 * self.rising if name == "v" else 0.0)

    def decay(self, channels: int) -> Rows:
        """w_0 = -6 + 5 (n / (H K - 1))^(0.7 + 1.3 rising): from slow channels to fast ones."""
        power = 0.7 + 1.3 * self.rising
        return Rows(lambda rows: -6.0 + 5.0 * (rows / max(channels - 1, 1)) ** power)

    def bonus(self, heads: int, head_dim: int) -> Rows:
        """u = rising (1 - n / (H K - 1)) + 0.1 ((n + 1) mod 3 - 1), n = h K + channel of head h."""

        def fill(rows: Tensor) -> Tensor:
            n = rows.unsqueeze(1) * head_dim + torch.arange(head_dim, device=rows.device)
            return self.rising * (1 - n / max(heads * head_dim - 1, 1)) + 0.1 * ((n + 1) % 3 - 1)

        return Rows(fill)


class Decay(Module):
    """The decay's base w_0 and the bonus u, kept and used in float32."""

    keep_fp32 = True
    no_weight_decay = ("base", "bonus")

    def __init__(self, heads: int, head_dim: int, recipe: _Recipe) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.empty(heads * head_dim))
        self.bonus = nn.Parameter(torch.empty(heads, head_dim))
        set_initializers(self, base=recipe.decay(heads * head_dim), bonus=recipe.bonus(heads, head_dim))

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Data-dependent part [T, H K] -> log decays [T, H, K], at most zero, and the bonus [H, K]."""
        wide = (self.base + logits.to(self.base.dtype)).clamp(max=HIGHEST_LOGIT)
        # A copy of the bonus, because under FSDP the parameter itself does not outlive this call.
        return -wide.exp().unflatten(-1, (-1, self.bonus.shape[1])), self.bonus.clone()


class TokenMix(Module):
    """Five mixes of a token with the one before, each by a learned ramp and a low-rank function of the token."""

    no_weight_decay = ("down", "up")

    def __init__(self, width: int, rank: int, recipe: _Recipe) -> None:
        super().__init__()
        self.rank = rank
        self.x = nn.Parameter(torch.empty(width))
        self.ramps = nn.ParameterDict({name: nn.Parameter(torch.empty(width)) for name in MIXES})
        self.down = nn.Parameter(torch.empty(5 * rank, width))
        self.up = nn.Parameter(torch.empty(5 * rank, width))
        set_initializers(self, x=recipe.mix("x", width), down=ZEROS, up=Uniform(-0.01, 0.01))
        set_initializers(self.ramps, **{name: recipe.mix(name, width) for name in MIXES})

    def forward(self, x_TD: Tensor, before_TD: Tensor) -> list[Tensor]:
        """The inputs of w, k, v, r and g, [T, D] each; before: each token's predecessor."""
        low = torch.tanh(F.linear(torch.lerp(x_TD, before_TD, self.x), self.down))
        inputs = []
        for index, name in enumerate(MIXES):
            block = slice(index * self.rank, (index + 1) * self.rank)
            learned_TD = low[:, block] @ self.up[block]
            inputs.append(torch.lerp(x_TD, before_TD, self.ramps[name] + learned_TD))
        return inputs


@register("rwkv6")
class RWKV6(Mixer[Options]):
    """Diagonal decay from the data, bonus for the current token, token shift."""

    projections = {"q": "r_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
    Options = Options
    variants = ({"mix_rank": 3, "decay_rank": 5}, {"heads": 3, "head_dim": 16})
    float8 = ("r_proj", "k_proj", "v_proj", "g_proj", "o_proj")
    regions = ("project", "mix")
    no_weight_decay = ("decay_down.weight", "decay_up.weight")

    def __init__(self, options: Options, model: ModelRecipe, place: LayerPlace) -> None:
        super().__init__(options, model, place)
        self.heads, self.head_dim = geometry(options, model)
        self.backend = model.kernel_backend
        inner, width = self.heads * self.head_dim, model.hidden_size
        recipe = _Recipe(place.layer, model.num_layers)
        self.token_mix = TokenMix(width, options.mix_rank, recipe)
        self.r_proj = orthogonal(width, inner, 1.0)
        self.k_proj = orthogonal(width, inner, 0.1)
        self.v_proj = orthogonal(width, inner, 1.0)
        self.g_proj = orthogonal(width, inner, 0.1)
        self.decay_down = linear(width, options.decay_rank, 0.0)
        self.decay_up = linear(options.decay_rank, inner, 0.0)
        set_initializers(self.decay_up, weight=Uniform(-0.01, 0.01))
        self.decay = Decay(self.heads, self.head_dim, recipe)
        self.norm = HeadGroupNorm(self.heads, self.head_dim, 64e-5, recipe.norm())
        self.o_proj = linear(inner, width, model.init_std / (2 * model.num_layers) ** 0.5)

    @classmethod
    def check(cls, options: Options, model: ModelRecipe) -> None:
        super().check(options, model)
        for key in ("mix_rank", "decay_rank"):
            if not getattr(options, key):
                raise RecipeError(f"mixer.rwkv6.{key} = 0: must be at least 1")

    def state_spec(self) -> dict[str, StateSpec]:
        return {
            "recurrent": StateSpec((self.heads, self.head_dim, self.head_dim), Carry.RECURRENT),
            "shift": StateSpec((1, self.token_mix.x.shape[0]), Carry.LAST_TOKENS, fp32=False),
        }

    def tensor_parallel(self) -> dict[str, Placement]:
        """Mixes are on every rank, but each rank sees only what its own heads make of them."""
        placements = {f"{name}.weight": Shard(0) for name in ("r_proj", "k_proj", "v_proj", "g_proj", "decay_up")}
        placements |= {f"token_mix.{name}": Replicate() for name, _ in self.token_mix.named_parameters()}
        placements |= {f"decay.{name}": Shard(0) for name in ("base", "bonus")}
        placements |= {f"norm.{name}": Shard(0) for name in ("weight", "bias")}
        return placements | {"decay_down.weight": Replicate(), "o_proj.weight": Shard(1)}

    def kernel_calls(self, device: str, dtype: torch.dtype) -> Iterator[KernelCall]:
        yield OPERATOR, self.backend, Call("bonus", device, dtype, self.head_dim)

    def mixing_flops(self, length: int) -> float:
        """The recurrence; the bonus is counted among the matrices, as if it were one."""
        return linear_recurrence_flops(self.heads, self.head_dim, self.head_dim)

    def project(self, x_TD: Tensor, past: Past) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Token shift, mixes and projections: see `project_after`; and the last inputs."""
        before_TD, last = token_shift(x_TD, past, past.state.get("shift"))
        return self.project_after(x_TD, before_TD), last

    def project_after(self, x_TD: Tensor, before_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """r, k, v, gate and the data-dependent part of the decay, [T, H K] each, of tokens and their predecessors."""
        w, k, v, r, g = self.token_mix(x_TD, before_TD)
        logits = self.decay_up(torch.tanh(self.decay_down(w)))
        return self.r_proj(r), self.k_proj(k), self.v_proj(v), self.g_proj(g), logits

    def mix(
        self, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, log_decay: Tensor, bonus: Tensor, past: Past
    ) -> tuple[Tensor, Tensor | None]:
        """Recurrence, norm and output projection, -> [T, D], and the recurrent state."""
        r, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (r, k, v))
        state = past.state.get("recurrent")
        o, after = linear_recurrence(r, k, v, log_decay, past, state, scale=1.0, bonus=bonus, backend=self.backend)
        return self.output(o, gate), after

    def output(self, o: Tensor, gate: Tensor) -> Tensor:
        """[T, H, V], [T, H V] -> [T, D]."""
        y = self.norm(o)
        return self.o_proj((y * F.silu(gate.to(y.dtype))).to(gate.dtype))

    def run(self, x_TD: Tensor, context: Context, past: Past) -> tuple[Tensor, After]:
        (r, k, v, gate, logits), last = self.region("project", past)(x_TD, past)
        y_TD, recurrent = self.region("mix", past)(r, k, v, gate, *self.decay(logits), past)
        return y_TD, {"recurrent": recurrent, "shift": last}
