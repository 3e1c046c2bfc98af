"""Held-out loss over tokens, a curve a model; another's model of the same layer is dashed, in the same colour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torchlinearmoe.plotting.figures import empty_figure

COLOURS = 10
LINES = ("-", "--", "-.")
"""Of the first ten layers, and of the next."""

Points = Sequence[tuple[float, float]]
"""(tokens, nats a token)."""


def draw_learning(models: Sequence[tuple[str, str, bool, Points]], file: Path) -> None:
    """(label, layer, whether it is another's, points) of each model, the legend in this order with the last loss.

    The first point of a curve is left out of what the axis spans, which the rest shares.
    """
    from matplotlib.ticker import EngFormatter

    figure = empty_figure(1)
    plot = figure.subplots()
    layers = sorted({layer for _, layer, _, _ in models})
    shown = [loss for *_, points in models for _, loss in (points[1:] or points)]
    for label, layer, others, points in models:
        place = layers.index(layer)
        plot.plot(
            *zip(*points),
            label=f"{label} {points[-1][1]:.3f}",
            color=f"C{place % COLOURS}",
            linestyle=":" if others else LINES[place // COLOURS % len(LINES)],
            linewidth=2.2 if others else 1.4,
        )
    margin = 0.04 * (max(shown) - min(shown)) or 0.1
    plot.set_ylim(min(shown) - margin, max(shown) + margin)
    plot.set_xlabel("tokens")
    plot.set_ylabel("held-out loss, nats a token")
    plot.xaxis.set_major_formatter(EngFormatter(sep=""))
    plot.grid(alpha=0.3)
    plot.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
