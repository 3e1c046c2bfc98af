"""The pictures, by matplotlib: curves of several runs in one picture, the load of experts as a heat map a run.

loss.png  grad_norm.png  throughput.png  expert_load.png
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchlinearmoe.errors import UserError
from torchlinearmoe.plotting.run import AXES, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 9.0, 5.0
"""Inches of a picture, of 150 pixels each."""
RANGE = 3
"""Of a heat map's colours, in doublings of the balanced load either way; the same for all, so that maps compare."""


def check_matplotlib(command: str = "plot", instead: str = "") -> None:
    """Raise UserError where there is no matplotlib, which `command` needs; `instead` is another way out."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UserError(
            f"{command} needs matplotlib, which is not installed; pip install matplotlib, or the extra "
            f"'torchlinearmoe[plot]'{instead}"
        ) from None


def draw(runs: Sequence[Run], labels: Sequence[str], folder: Path, axis: str = "tokens", smooth: int = 1) -> list[Path]:
    """Write the pictures into `folder`, against an axis of `AXES`; returns their files.

    smooth: logged steps in the running mean of training loss and gradient norm. Of what no run has there is no picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        "loss": curves(
            runs,
            labels,
            {"loss": "training", "validation_loss": "validation"},
            "loss, nats a token",
            axis,
            smooth={"loss": smooth},
        ),
        "grad_norm": curves(
            runs,
            labels,
            {"grad_norm": ""},
            "gradient norm before clipping",
            axis,
            log=True,
            smooth={"grad_norm": smooth},
        ),
        "throughput": curves(runs, labels, {"tokens_per_second": ""}, "tokens a second", axis, from_zero=True),
        "expert_load": load_maps(runs, labels, axis),
    }
    files = []
    for name, figure in made.items():
        if figure is not None:
            files.append(folder / f"{name}.png")
            figure.savefig(files[-1], dpi=150)
    return files


def curves(
    runs: Sequence[Run],
    labels: Sequence[str],
    keys: dict[str, str],
    title: str,
    axis: str,
    *,
    log: bool = False,
    from_zero: bool = False,
    smooth: dict[str, int] | None = None,
) -> Figure | None:
    """One picture of some keys of metrics.jsonl over all runs; a colour a run, the first key thin where there are two.

    keys: with what is said of each in the legend. Returns None where no run has any of them.
    """
    figure = empty_figure(1)
    plot: Axes = figure.subplots()
    drawn = 0
    for number, (run, label) in enumerate(zip(runs, labels)):
        for place, (key, said) in enumerate(keys.items()):
            x, y = run.series(key, axis)
            if not x:
                continue
            faint = len(keys) > 1 and place == 0
            plot.plot(
                x,
                _running_mean(y, (smooth or {}).get(key, 1)),
                color=f"C{number % 10}",
                linewidth=1.0 if faint else 1.8,
                alpha=0.6 if faint else 1.0,
                marker="o" if len(x) < 3 or (len(keys) > 1 and not faint and len(x) < 50) else "",
                markersize=4,
                label=f"{label}, {said}" if said else label,
            )
            drawn += 1
    if not drawn:
        return None
    _finish(plot, axis, title)
    if log:
        plot.set_yscale("log")
    if from_zero:
        plot.set_ylim(bottom=0)
    plot.legend(fontsize="small")
    return figure


def load_maps(runs: Sequence[Run], labels: Sequence[str], axis: str) -> Figure | None:
    """The busiest and the idlest expert of each layer over time, a row of two heat maps a run (and a kind of router).

    White is a balanced layer, red more, blue less, in doublings of the mean. None where no run has experts, or has a
    metrics.jsonl from before loads were written by layer.
    """
    rows = [
        (run, f"{label}: {said}", kind)
        for run, label in zip(runs, labels)
        for kind, said in (("moe", "experts"), ("mom", "memories"))
        if any(f"{kind}/max_load_by_layer" in line for line in run.lines)
    ]
    if not rows:
        return None
    figure = empty_figure(len(rows))
    grid = figure.subplots(len(rows), 2, squeeze=False)
    for (run, title, kind), plots in zip(rows, grid):
        for plot, key, said in zip(plots, ("max", "min"), ("busiest", "idlest")):
            _heat_map(figure, plot, run, kind, key, axis)
            plot.set_title(f"{title}, {said}", fontsize="small")
    return figure


def _heat_map(figure: Figure, plot: Axes, run: Run, kind: str, key: str, axis: str) -> None:
    key = f"{kind}/{key}_load_by_layer"
    lines = [line for line in run.lines if key in line]
    layers = sorted({layer for line in lines for layer in line[f"{kind}/layers"]})
    x, _ = run.series(key, axis)
    doublings = []
    for layer in layers:
        row = []
        for line in lines:
            loads = dict(zip(line[f"{kind}/layers"], line[key]))
            load = loads.get(layer)
            row.append(math.nan if load is None else math.log2(max(load, 2.0**-10)))
        doublings.append(row)
    edges = [x[0] - (x[1] - x[0] if len(x) > 1 else 1.0), *x]
    mesh = plot.pcolormesh(edges, _edges(len(layers)), doublings, cmap="RdBu_r", vmin=-RANGE, vmax=RANGE)
    plot.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    _finish(plot, axis, "layer", grid=False)
    bar = figure.colorbar(mesh, ax=plot, extend="both")
    bar.set_label("load over the mean")
    ticks = range(-RANGE, RANGE + 1)
    bar.set_ticks(list(ticks), labels=[f"{2.0**t:g}" for t in ticks])


def _edges(count: int) -> list[float]:
    return [index - 0.5 for index in range(count + 1)]


def empty_figure(rows: int) -> Figure:
    """An empty picture that needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, HEIGHT * rows if rows == 1 else 3.2 * rows), layout="constrained")


def _finish(plot: Any, axis: str, title: str, grid: bool = True) -> None:
    plot.set_xlabel(AXES[axis])
    plot.set_ylabel(title)
    if axis == "tokens":
        from matplotlib.ticker import EngFormatter

        plot.xaxis.set_major_formatter(EngFormatter(sep=""))
    if grid:
        plot.grid(alpha=0.3)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and up to `width - 1` before it."""
    result = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - width) : end]
        result.append(sum(part) / len(part))
    return result
