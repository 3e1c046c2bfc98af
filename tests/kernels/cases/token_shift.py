"""The token shift: states, awkward documents."""

from __future__ import annotations

from functools import partial

from cases import Case
from cases.recurrences import STREAMS, normal, stream, strided
from torchlinearmoe.kernels.token_shift import token_shift


def case(lengths: tuple[int, ...], states: str, D: int = 5) -> Case:
    """A call over a stream."""
    inputs = {"x": strided(sum(lengths), D)}
    if "in" in states:
        inputs["initial_state"] = normal(len(lengths), 1, D)
    return Case("token_shift", token_shift, inputs, stream(lengths, states))


CASES = [*(partial(case, *where) for where in STREAMS), partial(case, (1,) * 5, "in out")]
