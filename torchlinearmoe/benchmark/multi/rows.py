"""A row of the table: what a case found, whether it is as it should be, and if not, why in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
Figures = dict[str, Any]

TOLERANCES = {True: (1e-3, 1e-2), False: (1e-5, 1e-4)}
"""Relative, of losses and of gradient norms, in float32: on GPUs, whose kernels multiply in TF32, and on CPUs."""
FALLS = 0.05
"""By so many nats the loss must have fallen where it is compared: weights that stand still are equal on any layout."""


def failed(case: str, error: str) -> Row:
    """A case that did not come to its end."""
    return {"case": case, "result": "failed", "error": error}


def left_out(case: str, why: str) -> Row:
    """A case that this host or this call does not have."""
    return {"case": case, "result": "left out", "note": why}


def compared(case: str, found: Figures, expected: Figures, cuda: bool, start: int = 0) -> Row:
    """Losses and gradient norms of every step, beside those of another run from its step `start` on."""
    for figures in (found, expected):
        if "error" in figures:
            return failed(case, figures["error"])
    pairs = [(found[key], expected[key][start:]) for key in ("losses", "grad_norms")]
    if not pairs[0][0] or any(len(a) != len(b) for a, b in pairs):
        return failed(case, f"{len(pairs[0][0])} steps where {len(pairs[0][1])} were expected")
    differences = [_furthest(a, b) for a, b in pairs]
    row: Row = {"case": case, "loss_difference": differences[0], "grad_norm_difference": differences[1]}
    if found.get("max_load") is not None:
        row["max_load"] = found["max_load"]
    limits = TOLERANCES[cuda]
    if not all(difference <= limit for difference, limit in zip(differences, limits)):
        error = "losses differ by {:.1e} and gradient norms by {:.1e}, at most {:.0e} and {:.0e} may be"
        return row | {"result": "failed", "error": error.format(*differences, *limits)}
    losses = expected["losses"]
    if losses[0] - losses[-1] < FALLS:
        return row | {"result": "failed", "error": f"the loss only went from {losses[0]:.3f} to {losses[-1]:.3f}"}
    return row | {"result": "equal"}


def rated(case: str, found: Figures, against: Figures | None = None, name: str = "") -> Row:
    """A speed, and its share of another one."""
    if "error" in found:
        return failed(case, found["error"])
    row = {"case": case, "result": "timed", **found}
    if against is None or "error" in against:
        return row
    key = "tokens_per_second_per_gpu"
    return row | {"share": found[key] / against[key], "of": name}


def _furthest(found: Sequence[float], expected: Sequence[float]) -> float:
    """The largest relative difference; infinite where a number is not finite."""
    differences = [abs(a - b) / abs(b) if b else float("inf") for a, b in zip(found, expected)]
    return max(difference if difference == difference else float("inf") for difference in differences)
