"""The definition."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinearmoe.kernels.operator import Backend


def swiglu(gate_up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up for [gate | up]."""
    gate, up = gate_up.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


BACKEND = Backend("reference", swiglu, kinds=("swiglu",))
