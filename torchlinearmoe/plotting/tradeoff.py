"""What a state holds against its size, a curve a mixer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchlinearmoe.plotting.figures import empty_figure


@dataclass(frozen=True)
class Curve:
    """Of one mixer."""

    points: list[tuple[float, float]]
    """(bytes of state, accuracy)."""
    others: list[tuple[float, float]]
    """The same as others have published it."""


def draw_tradeoff(curves: Mapping[str, Curve], file: Path) -> None:
    """Accuracy against bytes of state, by name; what others published is dashed, in the same colour."""
    figure = empty_figure(1)
    plot = figure.subplots()
    for number, (name, curve) in enumerate(curves.items()):
        style: dict[str, Any] = {"color": f"C{number % 10}", "marker": "os^v"[number // 10 % 4]}
        plot.plot(*zip(*sorted(curve.points)), label=name, **style)
        if curve.others:
            plot.plot(*zip(*sorted(curve.others)), linestyle=":", alpha=0.5, label=f"{name}, published", **style)
    plot.set_xscale("log", base=2)
    plot.set_ylim(-0.02, 1.02)
    plot.set_xlabel("bytes of state a sequence")
    plot.set_ylabel("accuracy")
    plot.grid(alpha=0.3)
    plot.legend(fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
