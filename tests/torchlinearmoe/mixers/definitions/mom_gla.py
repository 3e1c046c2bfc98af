"""Du et al. 2025, arXiv 2502.13685, over gated linear attention."""

from __future__ import annotations

from definitions.memories import mixture
from definitions.plain import Layer
from torch import Tensor


def definition(layer: Layer, x: Tensor) -> Tensor:
    return mixture(layer, layer.options.inner or "gla", x)
