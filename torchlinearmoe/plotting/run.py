"""A run's `metrics.jsonl` as series: one key's values over tokens, steps or hours.

    {"step": 10, "loss": 5.1, "tokens": 5120, "tokens_per_second": 900.0, ...}
    {"step": 15, "validation_loss": 4.9}                                          a validation without a logged step

Lines without `tokens` get theirs by going straight between their neighbours. Hours are those of training, from tokens
and their rate, so that they go on over a pause between two starts, and are known of files without time stamps too.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torchlinearmoe.errors import UserError
from torchlinearmoe.recipe import Recipe, load_recipe

METRICS_FILE = "metrics.jsonl"
RECIPE_FILE = "recipe.toml"
AXES = {"tokens": "tokens", "steps": "steps", "hours": "hours of training"}
"""What curves may be drawn against, and how it is written under them."""


@dataclass(frozen=True)
class Run:
    """What a run's folder tells."""

    folder: Path
    lines: list[dict[str, Any]]
    """Of metrics.jsonl, in the order of their steps."""

    @cached_property
    def recipe(self) -> Recipe | None:
        """Its resolved recipe; None where it cannot be read."""
        try:
            return load_recipe(self.folder / RECIPE_FILE)
        except UserError:
            return None

    def series(self, key: str, axis: str = "tokens") -> tuple[list[float], list[Any]]:
        """Places on an axis of `AXES`, and the values of `key` there; lines without one are left out."""
        lines = [line for line in self.lines if line.get(key) is not None]
        return [self._place(line["step"], axis) for line in lines], [line[key] for line in lines]

    def _place(self, step: int, axis: str) -> float:
        if axis == "steps":
            return step
        steps, tokens, hours = self._clock
        return _between(step, steps, tokens if axis == "tokens" else hours)

    @cached_property
    def _clock(self) -> tuple[list[float], list[float], list[float]]:
        """Steps, and the tokens and hours of training until each; from zero."""
        steps, tokens, hours = [0.0], [0.0], [0.0]
        for line in self.lines:
            if line.get("tokens") is None or line["step"] <= steps[-1]:
                continue
            rate = line.get("tokens_per_second") or 0.0
            hours.append(hours[-1] + ((line["tokens"] - tokens[-1]) / rate / 3600 if rate else 0.0))
            steps.append(line["step"])
            tokens.append(line["tokens"])
        return steps, tokens, hours


def read_run(path: str | Path) -> Run:
    """The run in a folder, or of a `metrics.jsonl`. What is no line of figures, such as a torn last one, is left out.

    Raises UserError where there is none, or nothing in it yet.
    """
    file = Path(path)
    file = file / METRICS_FILE if file.is_dir() else file
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); name the folder of a run") from None
    lines = [line for line in map(_figures, text.splitlines()) if line is not None]
    if not lines:
        raise UserError(f"{file}: holds no logged step yet; wait for the first one, or name the folder of a run")
    return Run(file.parent, sorted(lines, key=lambda line: line["step"]))


def _figures(text: str) -> dict[str, Any] | None:
    """A line that is an object with a step."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None


def _between(x: float, xs: list[float], ys: list[float]) -> float:
    """The piecewise straight line through (xs, ys) at x, going on at its last slope beyond the end."""
    if len(xs) == 1:
        return ys[0]
    right = min(max(bisect_left(xs, x), 1), len(xs) - 1)
    slope = (ys[right] - ys[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right - 1] + slope * (x - xs[right - 1])
