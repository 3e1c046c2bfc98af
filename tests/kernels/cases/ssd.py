"""State space duality: groups of heads, states, awkward documents, odd widths."""

from __future__ import annotations

from functools import partial

import torch

from cases import Case
from cases.recurrences import STREAMS, normal, stream, strided
from torchlinearmoe.kernels.ssd import ssd


def case(lengths: tuple[int, ...], states: str, H: int = 2, G: int = 1, K: int = 16, V: int = 24) -> Case:
    """A call as Mamba2 makes it."""
    T = sum(lengths)
    inputs = {"x": strided(T, H, V), "dt": torch.rand(T, H, dtype=torch.float64), "A": -torch.rand(H).double() - 0.1}
    inputs |= {"B": normal(T, G, K), "C": strided(T, G, K)}
    if "in" in states:
        inputs["initial_state"] = normal(len(lengths), H, K, V)
    wide = ("dt", "A", "initial_state")
    return Case("ssd", ssd, inputs, stream(lengths, states), wide=wide, channels=K, sums=("A",))


CASES = [
    *(partial(case, *where) for where in STREAMS),
    partial(case, (70, 3), "in out", H=4, G=2, K=40, V=72),
    partial(case, (66, 9), "in out", H=1, K=33, V=17),
    partial(case, (1,) * 5, "in out", H=4, G=2),
]
