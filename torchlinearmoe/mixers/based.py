"""Based: linear attention with the exponential's second-order Taylor series (Arora et al. 2024, arXiv 2402.18668).

    o_t = sum_{j <= t} f(s_tj) v_j / sum_{j <= t} f(s_tj),      f(s) = 1 + s + s^2 / 2,      s_tj = q_t . k_j / sqrt(K)
    y_t = W_o o_t

Queries and keys are projected to K = 16 channels a head, which makes 1 + K + K (K + 1) / 2 = 153 features: 1, x_i and
every product x_i x_j once. f is at least 1/2, so the denominator never vanishes. No decay and no positions: the paper
puts layers of it beside short convolutions and sliding-window attention (`conv` here; `window` of softmax_attention).

Shapes: T tokens, D width, H heads, K query and key width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchlinearmoe.mixers.base import register
from torchlinearmoe.mixers.quadratic import QuadraticAttention, QuadraticOptions


@dataclass(frozen=True, kw_only=True)
class Options(QuadraticOptions):
    """`[mixer.based]`."""


@register("based")
class Based(QuadraticAttention[Options]):
    """Scores 1 + s + s^2 / 2, normalised; nothing but projections to learn."""

    Options = Options
    variants = ({"conv": 3, "feature_dim": 8}, {"gate": True, "heads": 3, "head_dim": 24, "feature_dim": 5})
    kind = "taylor"
    epsilon = 1e-6
