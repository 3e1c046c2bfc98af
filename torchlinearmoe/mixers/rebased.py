"""Rebased: linear attention with a learned square in place of Based's series (Aksenov et al. 2024, arXiv 2402.10644).

    o_t = sum_{j <= t} s_tj^2 v_j / sum_{j <= t} s_tj^2,      s_tj = q^_t . k^_j / sqrt(K),      y_t = W_o o_t
    q^ = gamma_q * LN(q) + beta_q,      k^ = gamma_k * LN(k) + beta_k

LN is layer normalisation over a head's K = 16 channels; gamma and beta, one set for queries and one for keys, are
shared by the heads. The square makes K (K + 1) / 2 = 136 features: every product x_i x_j once. Unlike a Taylor series,
a square can be exactly zero, so a token can be left out.

Shapes: T tokens, H heads, K query and key width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate

from torchlinearmoe.initialize import ONES, ZEROS, set_initializers
from torchlinearmoe.mixers.base import LayerPlace, register
from torchlinearmoe.mixers.quadratic import QuadraticAttention, QuadraticOptions
from torchlinearmoe.module import Module
from torchlinearmoe.precision import in_float32
from torchlinearmoe.recipe.schema import ModelRecipe


@dataclass(frozen=True, kw_only=True)
class Options(QuadraticOptions):
    """`[mixer.rebased]`."""

    tie_norms: bool = False
    """One gamma and beta for queries and keys together."""


class HeadLayerNorm(Module):
    """gamma * (x - mean) / sqrt(variance + eps) + beta over a head; computed in float32, returned in x's type."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        set_initializers(self, weight=ONES, bias=ZEROS)

    def forward(self, x: Tensor) -> Tensor:
        """[T, H, K] -> [T, H, K]."""
        wide = in_float32(x)
        y = F.layer_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.bias.to(wide.dtype), self.eps)
        return y.to(x.dtype)


@register("rebased")
class Rebased(QuadraticAttention[Options]):
    """Scores s^2 of normalised queries and keys with an affine map each."""

    Options = Options
    variants = ({"tie_norms": True, "conv": 3, "feature_dim": 8}, {"gate": True, "heads": 3, "head_dim": 24})
    kind = "square"
    epsilon = 1e-5

    def __init__(self, options: Options, model: ModelRecipe, place: LayerPlace) -> None:
        super().__init__(options, model, place)
        self.q_norm = HeadLayerNorm(options.feature_dim, model.norm_eps)
        self.k_norm = None if options.tie_norms else HeadLayerNorm(options.feature_dim, model.norm_eps)

    def tensor_parallel(self) -> dict[str, Placement]:
        norms = ("q_norm",) if self.k_norm is None else ("q_norm", "k_norm")
        placements = {f"{norm}.{name}": Replicate() for norm in norms for name in ("weight", "bias")}
        return super().tensor_parallel() | placements

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm(q), (self.q_norm if self.k_norm is None else self.k_norm)(k)
