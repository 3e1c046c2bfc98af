"""The run on the terminal: a bar and a line of figures, updated in place; in a file or pipe, plain lines."""

import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from torchlinearmoe.errors import visible

if TYPE_CHECKING:
    from rich.console import RenderableType


class Console:
    """Shows the progress of a run of `total_steps` steps that begins after step `step`.

    stream: default the standard output. On a terminal, a bar that moves with every step and the newest figures under
    it, in place; else one plain line for each call that has something to say.
    """

    def __init__(self, *, total_steps: int, step: int = 0, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._total_steps = total_steps
        self._bar = _Bar(total_steps, step, self._stream) if self._stream.isatty() else None

    @property
    def is_terminal(self) -> bool:
        """Whether figures replace one another in place."""
        return self._bar is not None

    def advance(self, step: int) -> None:
        """Step `step` is done; moves the bar, says nothing elsewhere."""
        if self._bar is not None:
            self._bar.show(step)

    def figures(self, step: int, values: Mapping[str, Any], seconds_left: float | None = None) -> None:
        """Show the figures of a metrics line for step `step`."""
        if self._bar is not None:
            self._bar.show(step, format_figures(values, seconds_left, width=self._bar.width))
        else:
            self._print(f"step {step}/{self._total_steps} | {format_figures(values, seconds_left)}")

    def message(self, text: str) -> None:
        """Say one line that stays, above the bar if there is one."""
        text = visible(text)
        if self._bar is not None:
            self._bar.message(text)
        else:
            self._print(text)

    def close(self) -> None:
        """Leave the bar as it stands; a second call does nothing."""
        if self._bar is not None:
            self._bar.close()

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class _Bar:
    """The terminal's two rows, updated in place: a progress bar and the newest figures."""

    def __init__(self, total_steps: int, step: int, stream: TextIO) -> None:
        from rich.console import Console as RichConsole
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            expand=True,
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=step)
        self._figures = "the first step prepares ..."
        self._live = Live(console=RichConsole(file=stream), get_renderable=self._rows, refresh_per_second=4)
        self._live.start()

    @property
    def width(self) -> int:
        return self._live.console.width

    def _rows(self) -> "RenderableType":
        from rich.console import Group
        from rich.text import Text

        return Group(self._progress, Text(self._figures))

    def show(self, step: int, figures: str | None = None) -> None:
        self._progress.update(self._task, completed=step)
        if figures is not None:
            self._figures = figures

    def message(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._live.stop()


def format_figures(values: Mapping[str, Any], seconds_left: float | None = None, width: int | None = None) -> str:
    """One line for people from a metrics line; what is not known shows as `-`, what is not there is left out.

    width: columns that it must fit; what is missed least is left out.

    >>> format_figures({"loss": 3.25, "tokens_per_second": 101234.0, "mfu": None}, 4000)
    'loss 3.2500 | 101.2K tok/s | left 1h06m'
    """
    parts = {key: text(values[key]) for key, text in _FIGURES.items() if key in values}
    if values.get("mfu") is None:  # no device whose peak is known
        parts.pop("mfu", None)
    if values.get("skipped_steps"):
        parts["skipped"] = f"skipped {values['skipped_steps']:.0f}"
    if seconds_left is not None:
        parts["left"] = f"left {format_seconds(seconds_left)}"
    for key in _MISSED_LEAST:
        if width is not None and len(" | ".join(parts.values())) > width:
            parts.pop(key, None)
    return " | ".join(parts.values())


def format_number(value: float | None) -> str:
    """A count in three or four digits: 950, 12.3K, 101.2K, 3.46M, 2.50B.

    >>> [format_number(n) for n in (950, 12_345, 3_456_789, None)]
    ['950', '12.3K', '3.46M', '-']
    """
    if value is None or not math.isfinite(value):
        return "-"
    for size, letter, digits in ((1e12, "T", 2), (1e9, "B", 2), (1e6, "M", 2), (1e3, "K", 1)):
        if abs(value) >= size:
            return f"{value / size:.{digits}f}{letter}"
    return f"{value:.0f}"


def format_seconds(seconds: float | None) -> str:
    """A duration in its two largest units: 42s, 5m07s, 1h06m, 3d04h.

    >>> [format_seconds(s) for s in (42, 307, 4000, 273_600)]
    ['42s', '5m07s', '1h06m', '3d04h']
    """
    if seconds is None or not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02d}h"


def _or_dash(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


_FIGURES = {
    "loss": lambda value: f"loss {_or_dash(value, '.4f')}",
    "validation_loss": lambda value: f"validation loss {_or_dash(value, '.4f')}",
    "tokens_per_second": lambda value: f"{format_number(value)} tok/s",
    "mfu": lambda value: f"MFU {_or_dash(value, '.1%')}",
    "grad_norm": lambda value: f"grad norm {_or_dash(value, '.3f')}",
    "lr": lambda value: f"lr {_or_dash(value, '.2e')}",
    "memory_gib": lambda value: f"{_or_dash(value, '.1f')} GiB",
    "moe/max_load": lambda value: f"max load {_or_dash(value, '.2f')}",
    "mom/max_load": lambda value: f"max memory load {_or_dash(value, '.2f')}",
    "tokens": lambda value: f"{format_number(value)} tokens",
}
_MISSED_LEAST = (
    *("validation_loss", "tokens", "mom/max_load", "lr", "memory_gib", "moe/max_load", "grad_norm", "mfu"),
    *("tokens_per_second", "left", "skipped"),
)
"""Figures by the order in which a narrow terminal goes without."""
