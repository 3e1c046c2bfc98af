"""Gated slot attention: states, awkward documents, odd widths, one slot."""

from __future__ import annotations

from functools import partial

from cases import Case
from cases.recurrences import STREAMS, gates, normal, stream, strided
from torchlinearmoe.kernels.slots import slot_attention
from torchlinearmoe.kernels.slots.kinds import slot_kind


def case(lengths: tuple[int, ...], states: str, H: int = 2, K: int = 16, V: int = 24, S: int = 16) -> Case:
    """A call as GSA makes it: s = 1 - decay."""
    T, N = sum(lengths), len(lengths)
    decay = gates(T, H, S)
    inputs = {"q": strided(T, H, K), "k": normal(T, H, K), "v": strided(T, H, V), "s": 1 - decay.exp()}
    inputs["log_decay"] = decay
    if "in" in states:
        inputs |= {"first_keys": normal(N, H, K, S), "first_values": normal(N, H, S, V)}
    wide = ("log_decay", "first_keys", "first_values")
    return Case(slot_kind(S), call, inputs, stream(lengths, states), wide=wide, channels=K)


def call(first_keys=None, first_values=None, **arguments):
    """The operator, its two states as inputs of their own."""
    if first_keys is not None:
        arguments["initial_state"] = (first_keys, first_values)
    return slot_attention(**arguments)


CASES = [
    *(partial(case, *where) for where in STREAMS),
    partial(case, (70, 3), "in out", K=40, V=72, S=33),
    partial(case, (70, 1, 63), "in out", S=8),
    partial(case, (66,), "in out", H=1, K=33, V=17, S=1),
    partial(case, (1,) * 5, "in out"),
]
