"""Diagonal plus low rank transitions: states, awkward documents, odd widths."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from cases import Case
from cases.recurrences import STREAMS, gates, normal, stream, strided
from torchlinearmoe.kernels.dplr import dplr_rule


def case(lengths: tuple[int, ...], states: str, H: int = 2, K: int = 16, V: int = 24) -> Case:
    """A call as RWKV7 makes it."""
    T = sum(lengths)
    inputs = {"q": strided(T, H, K), "k": normal(T, H, K), "v": strided(T, H, V)}
    removal = F.normalize(normal(T, H, K), dim=-1)
    inputs |= {"a": -removal, "b": removal * torch.rand(T, H, K, dtype=torch.float64), "log_decay": gates(T, H, K)}
    if "in" in states:
        inputs["initial_state"] = normal(len(lengths), H, K, V)
    return Case(
        "dplr", dplr_rule, inputs, stream(lengths, states), wide=("log_decay", "initial_state"), tolerance=3, channels=K
    )


CASES = [
    *(partial(case, *where) for where in STREAMS),
    partial(case, (70, 3), "in out", K=40, V=72),
    partial(case, (66,), "in out", H=1, K=33, V=17),
    partial(case, (1,) * 5, "in out"),
]
