"""Folders as runs leave them, written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RECIPE = {"model": {"mixer": "gla"}, "training": {"steps": 8}}


def write_run(folder: Path, lines: Sequence[Mapping[str, Any]], overrides: Sequence[str] = ()) -> Path:
    """A run's folder with a resolved recipe and these lines of metrics."""
    from torchlinearmoe.recipe import dump, resolve
    from torchlinearmoe.recipe.parse import parse_overrides

    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(dump(resolve(RECIPE, parse_overrides(overrides))))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def line(step: int, **more: Any) -> dict[str, Any]:
    """A logged step of 100 tokens at 50 tokens a second."""
    figures = {"loss": 4.0 / step, "grad_norm": 1.0, "tokens": 100 * step, "tokens_per_second": 50.0}
    return {"step": step, **figures, **more}
