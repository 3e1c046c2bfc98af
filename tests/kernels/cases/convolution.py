"""The short convolution: widths from one tap on, bias, activation, states, awkward documents."""

from __future__ import annotations

from functools import partial

from cases import Case
from cases.recurrences import STREAMS, normal, stream, strided
from torchlinearmoe.kernels.convolution import short_convolution


def case(
    lengths: tuple[int, ...], states: str, D: int = 5, W: int = 4, bias: bool = True, activation: str | None = "silu"
) -> Case:
    """A call with `W` taps."""
    inputs = {"x": strided(sum(lengths), D), "weight": normal(D, W)}
    if bias:
        inputs["bias"] = normal(D)
    if "in" in states:
        inputs["initial_state"] = normal(len(lengths), W - 1, D)
    return Case("convolution", short_convolution, inputs, stream(lengths, states) | {"activation": activation})


CASES = [
    *(partial(case, *where) for where in STREAMS),
    *(partial(case, (3, 1, 0, 9), "in out", W=W, bias=False, activation=None) for W in (1, 2, 7)),
    partial(case, (1,) * 5, "in out"),
]
