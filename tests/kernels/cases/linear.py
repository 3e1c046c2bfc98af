"""The linear recurrence: every kind, states, awkward documents, odd widths."""

from __future__ import annotations

from functools import partial

import torch

from cases import Case
from cases.recurrences import STREAMS, gates, normal, stream, strided
from torchlinearmoe.kernels.linear import linear_recurrence
from torchlinearmoe.kernels.linear.kinds import KINDS


def case(kind: str, lengths: tuple[int, ...], states: str, H: int = 2, K: int = 16, V: int = 24) -> Case:
    """A call of the kind."""
    T, N = sum(lengths), len(lengths)
    inputs = {"q": strided(T, H, K), "k": normal(T, H, K), "v": strided(T, H, V)}
    options, sums = stream(lengths, states), ("bonus",)
    if kind == "constant":
        decay = -torch.rand(H, dtype=torch.float64) / 4
        if "out" in states:
            inputs["log_decay"], kind, sums = decay, "scalar", ("log_decay",)
        else:
            options["log_decay"] = decay
    elif kind != "identity":
        inputs["log_decay"] = gates(T, H) if kind == "scalar" else gates(T, H, K)
    if kind == "bonus":
        inputs["bonus"] = normal(H, K)
    if "in" in states:
        inputs["initial_state"] = normal(N, H, K, V)
    wide = ("log_decay", "bonus", "initial_state")
    return Case(kind, linear_recurrence, inputs, options, wide=wide, channels=K, sums=sums)


CASES = [
    *(partial(case, kind, *where) for kind in KINDS for where in STREAMS),
    *(partial(case, kind, (70, 3), "in out", K=72, V=40) for kind in KINDS),
    *(partial(case, kind, (66,), "in out", H=1, K=33, V=100) for kind in KINDS),
    *(partial(case, kind, (1,) * 5, "in out") for kind in KINDS),
]
