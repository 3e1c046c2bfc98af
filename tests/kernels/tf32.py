"""Triton's interpreter with products of float32 as a GPU makes them.

A GPU reads the operands of a product in TF32 without their last 13 bits; the interpreter would take all of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def truncated(x: np.ndarray) -> np.ndarray:
    """Of float32 what TF32 holds: 10 bits behind the point."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def install() -> None:
    """Make the interpreter of this process truncate. Three products of TF32 ("tf32x3") stay exact."""
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    exact = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, *others: Any) -> Any:
        if a.data.dtype == np.float32 and input_precision.name == "TF32":
            a, b = (interpreter.TensorHandle(truncated(x.data), x.dtype) for x in (a, b))
        return exact(self, a, b, d, input_precision, *others)

    builder.create_dot = create_dot


def product(precision: Any) -> float:
    """Of 1 + 2^-12 by 1, sixteen of them in a row, divided by 16; in a process that interprets."""
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, y, z, PRECISION: tl.constexpr):
        places = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        tl.store(z + places, tl.dot(tl.load(x + places), tl.load(y + places), input_precision=PRECISION))

    x, y, z = torch.full((16, 16), 1 + 2.0**-12), torch.ones(16, 16), torch.zeros(16, 16)
    kernel[(1,)](x, y, z, PRECISION=precision)
    return float(z[0, 0]) / 16
