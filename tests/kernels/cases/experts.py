"""Tokens through experts: few and many, empty ones, one an assignment, dropped assignments, nothing but them."""

from __future__ import annotations

import math
from functools import partial

import torch

from cases import Case
from torchlinearmoe.kernels.experts import routed_experts


def routed(
    tokens: int,
    experts: int,
    top_k: int,
    width: int = 16,
    hidden: int = 8,
    busy: int = 0,
    kept: float = 1.0,
    strided: bool = False,
    gated: bool = True,
) -> Case:
    """Of `experts`, all or the first `busy` are chosen; a share of the assignments is kept."""
    x, scale = torch.randn(tokens, width, dtype=torch.float64), width**-0.5
    inputs = {
        "x_TD": x.t().contiguous().t() if strided else x,
        "weights_Tk": torch.rand(tokens, top_k, dtype=torch.float64),
        "gate_up_EDF": torch.randn(experts, width, hidden * (1 + gated), dtype=torch.float64) * scale,
        "down_EFD": torch.randn(experts, hidden, width, dtype=torch.float64),
    }
    if strided:
        inputs["gate_up_EDF"] = inputs["gate_up_EDF"].transpose(1, 2).contiguous().transpose(1, 2)
    keep = None if kept == 1 else torch.rand(tokens, top_k) < kept
    options = {"ids_Tk": torch.rand(tokens, busy or experts).argsort(-1)[:, :top_k], "keep_Tk": keep}
    kind, channels = "experts" if gated else "relu2", math.gcd(width, hidden)
    return Case(kind, routed_experts, inputs, options, wide=("weights_Tk",), channels=channels, tolerance=2)


CASES = [
    partial(routed, 1, 3, 2),
    partial(routed, 37, 6, 2),
    partial(routed, 21, 4, 3, width=24, hidden=40, kept=0.6),
    partial(routed, 9, 5, 1, busy=2, strided=True),
    partial(routed, 8, 4, 4, width=5, hidden=3, kept=0.5),
    partial(routed, 6, 3, 2, kept=0.0),
    partial(routed, 0, 4, 2),
    partial(routed, 1, 3, 2, gated=False),
    partial(routed, 21, 4, 3, width=24, hidden=40, kept=0.6, gated=False),
    partial(routed, 8, 4, 4, width=5, hidden=3, gated=False),
    partial(routed, 9, 5, 1, busy=2, strided=True, gated=False),
    partial(routed, 0, 4, 2, gated=False),
]
