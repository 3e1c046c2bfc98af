"""The gate of a feed-forward: silu(gate) * up (Shazeer 2020, arXiv 2002.05202), of both in one tensor.

Shapes: F hidden width.
"""

from __future__ import annotations

from torch import Tensor

from torchlinearmoe.kernels.choose import choose
from torchlinearmoe.kernels.operator import Budget, Call, Operator

OPERATOR = Operator("swiglu", ("swiglu",))


def swiglu(gate_up: Tensor, backend: str = "auto") -> Tensor:
    """silu(gate) * up for gate_up = [gate | up]: [..., 2F] -> [..., F]."""
    return choose(OPERATOR, backend, Call("swiglu", gate_up.device.type, gate_up.dtype)).run(gate_up)


def budget(rows: int, hidden: int, itemsize: int = 2) -> Budget:
    """Of `rows` rows of 2 `hidden` numbers of `itemsize` bytes."""
    half = rows * hidden * itemsize
    return Budget(rows * hidden * 5.0, forward_bytes=3 * half, backward_bytes=5 * half, saved_bytes=2 * half)
