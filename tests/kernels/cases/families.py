"""Every recurrence by name, as a function of documents, states and sizes that draws a case."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from cases import Case, delta, dplr, linear, quadratic, slots, ssd
from torchlinearmoe.kernels.linear.kinds import KINDS

FAMILIES: dict[str, Callable[..., Case]] = {
    **{kind: partial(linear.case, kind) for kind in KINDS},
    "delta": partial(delta.case, "plain"),
    "gated_delta": partial(delta.case, "gated"),
    "grouped_delta": partial(delta.case, "gated", groups=2),
    "kda": partial(delta.case, "channels"),
    "grouped_kda": partial(delta.case, "channels", groups=2),
    "dplr": dplr.case,
    "slots": slots.case,
    "ssd": ssd.case,
    "taylor": partial(quadratic.case, "taylor"),
    "square": partial(quadratic.case, "square"),
}
DECAYED = ("scalar", "diagonal", "bonus", "gated_delta", "kda", "dplr", "slots")
"""Those with a log decay for each token."""
SIZES = (0.0, -1e-6, -1e-3, -0.1, -1.0, -20.0, -1e4, -torch.inf)
"""Log decays from none to a reset."""


def mixed_decays(case: Case) -> Case:
    """The case with decays of every size beside each other: one in eight or so erases the state."""
    weights = torch.tensor([8.0, 8.0, 8.0, 4.0, 2.0, 1.0, 1.0, 1.0])
    shape = case.inputs["log_decay"].shape
    picks = torch.multinomial(weights, shape.numel(), replacement=True)
    case.inputs["log_decay"] = torch.tensor(SIZES, dtype=torch.float64)[picks].view(shape)
    return case
