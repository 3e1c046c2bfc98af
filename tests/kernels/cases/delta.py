"""The delta rule: every gate, grouped heads, states, awkward documents, odd widths."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from cases import Case
from cases.recurrences import STREAMS, gates, normal, stream, strided
from torchlinearmoe.kernels.delta import delta_rule
from torchlinearmoe.kernels.delta.kinds import KINDS


def case(
    kind: str, lengths: tuple[int, ...], states: str, H: int = 2, groups: int = 1, K: int = 16, V: int = 24
) -> Case:
    """A call of the kind; betas up to 2."""
    T, HV = sum(lengths), H * groups
    inputs = {"q": strided(T, H, K), "k": F.normalize(normal(T, H, K), dim=-1), "v": strided(T, HV, V)}
    inputs["beta"] = 2 * torch.rand(T, HV, dtype=torch.float64)
    if kind != "plain":
        inputs["log_decay"] = gates(T, HV) if kind == "gated" else gates(T, HV, K)
    if "in" in states:
        inputs["initial_state"] = normal(len(lengths), HV, K, V)
    options = stream(lengths, states) | {"l2_norm": groups > 1}
    wide = ("beta", "log_decay", "initial_state")
    return Case(kind, delta_rule, inputs, options, wide=wide, tolerance=3, channels=K)


CASES = [
    *(partial(case, kind, *where) for kind in KINDS for where in STREAMS),
    *(partial(case, kind, (70, 3), "in out", groups=2, K=40, V=72) for kind in KINDS),
    *(partial(case, kind, (66,), "in out", H=1, K=33, V=17) for kind in KINDS),
    *(partial(case, kind, (1,) * 5, "in out", groups=2) for kind in KINDS),
]
