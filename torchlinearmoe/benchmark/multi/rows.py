"""A row of the table: what a case found, whether it is as it should be, and if not, why in one line."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]
Figures = dict[str, Any]

TOLERANCES = {True: (2e-3, 1e-2), False: (1e-3, 1e-4)}
"""Relative, of the losses and of the first step's gradients, in float32: on GPUs, which may multiply in TF32, and on
CPUs. A rounding that sends a token to another expert moves later losses by 1e-4 and more, whatever the layout; the
gradients before any of that tell what is wrong."""
NEGLIGIBLE = 1e-4
"""Of all gradients' norm: so much is added to each, as rounding is of what cancels."""


def failed(case: str, error: str) -> Row:
    """A case that did not come to its end."""
    return {"case": case, "result": "failed", "error": error}


def left_out(case: str, why: str) -> Row:
    """A case that this host or this call does not have."""
    return {"case": case, "result": "left out", "note": why}


def compared(case: str, found: Figures, expected: Figures, cuda: bool, start: int = 0) -> Row:
    """Losses and the first gradients, beside those of another run from its step `start` on."""
    for figures in (found, expected):
        if "error" in figures:
            return failed(case, figures["error"])
    losses = expected["losses"][start:]
    if not losses or len(found["losses"]) != len(losses):
        return failed(case, f"{len(found['losses'])} steps where {len(losses)} were expected")
    loss = max(_difference(a, b) for a, b in zip(found["losses"], losses))
    if "gradients" in found:
        gradient, name = _furthest(found["gradients"], expected["gradients"])
    else:
        gradient, name = _difference(found["grad_norms"][0], expected["grad_norms"][start]), "all parameters"
    row: Row = {"case": case, "loss_difference": loss, "gradient_difference": gradient}
    row |= {key: found[key] for key in ("max_load", "run_s") if found.get(key) is not None}
    limits = TOLERANCES[cuda]
    if loss <= limits[0] and gradient <= limits[1]:
        return row | {"result": "equal"}
    error = f"losses differ by {loss:.1e}, the first gradient of {name} by {gradient:.1e}; {limits[0]:.0e} and "
    return row | {"result": "failed", "error": error + f"{limits[1]:.0e} may be"}


def rated(case: str, found: Figures, against: Figures | None = None, name: str = "") -> Row:
    """A speed, and its share of another one."""
    if "error" in found:
        return failed(case, found["error"])
    row = {"case": case, "result": "timed", **found}
    if against is None or "error" in against:
        return row
    key = "tokens_per_second_per_gpu"
    return row | {"share": found[key] / against[key], "of": name}


def _furthest(found: Mapping[str, float], expected: Mapping[str, float]) -> tuple[float, str]:
    """The largest relative difference of norms, and whose."""
    if missing := found.keys() ^ expected.keys():
        return math.inf, min(missing)
    least = NEGLIGIBLE * math.hypot(*expected.values())
    return max((_difference(found[name], norm, least), name) for name, norm in expected.items())


def _difference(found: float, expected: float, least: float = 0.0) -> float:
    """Relative; infinite where a number is not finite."""
    if not (math.isfinite(found) and math.isfinite(expected)):
        return math.inf
    return abs(found - expected) / max(abs(expected) + least, sys.float_info.min)
