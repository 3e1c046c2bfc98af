"""Contestants: each a process of its own, so that none inherits another's memory, caches or clocks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

MARK = "RESULT "
_WORDS = (
    "contestant",
    "category",
    "part",
    "operator",
    "backend",
    "error",
    "section",
    "case",
    "result",
    "of",
    "note",
    "source",
    "keeps up",
)


def run_contestant(module: str, options: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """Run `python -m MODULE` with `options` as JSON on its command line; its figures, or {"error": one line}."""
    command = [sys.executable, "-m", module, json.dumps(dict(options))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {timeout:.0f} s"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return {"error": (errors or lines or [f"exit status {done.returncode}"])[-1].strip()[:300]}


def answer(figures: Mapping[str, Any]) -> None:
    """A contestant's last words."""
    print(MARK + json.dumps(dict(figures)), flush=True)


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as one table; columns in the order they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in _WORDS else "right")
    for row in rows:
        table.add_row(*(cell(row.get(column)) for column in columns))
    Console(width=max(Console().width, 160)).print(table)


def cell(value: Any) -> str:
    """A value as tables show it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
