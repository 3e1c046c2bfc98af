"""What a sweep has found so far: `recall.json`, written whole after every model, never half.

Several sweeps may write into one folder; each adds to what the others found.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchlinearmoe.errors import UserError
from torchlinearmoe.recall.cases import Case
from torchlinearmoe.recall.learn import Outcome

FILE = "recall.json"
FORMAT = 1

Line = dict[str, Any]
"""A model: `key`, `setting`, `label`, `mixer`, `width`, `lr`, and the fields of its Outcome."""


def read_results(folder: Path) -> dict[str, Line]:
    """The lines by their keys; none where there is no file. Raises UserError for a file that is something else."""
    file = folder / FILE
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        if table["format"] != FORMAT:
            raise UserError(f"{file}: format {table['format']!r}, not {FORMAT}; name another --output")
        return {line["key"]: line for line in table["models"]}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); name another --output") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: is not what a sweep writes; mend it, or name another --output") from None


def add_result(folder: Path, setting: str, case: Case, outcome: Outcome) -> Line:
    """Write down what became of a model, beside all that is there by now."""
    line = {
        "key": case.key,
        "setting": setting,
        "label": case.label,
        "mixer": case.mixer,
        "width": case.width,
        "lr": case.lr,
        **asdict(outcome),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{FILE}.lock").open("w") as lock:
        with suppress(OSError):  # a file system without such locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        models = [*(read_results(folder) | {case.key: line}).values()]
        aside = folder / f".{FILE}.{os.getpid()}"
        aside.write_text(json.dumps({"format": FORMAT, "models": models}, indent=1) + "\n", encoding="utf-8")
        aside.replace(folder / FILE)
    return line


def best(lines: Iterable[Line]) -> list[Line]:
    """The learning rate that is best of each mixer and width, smaller states first within a mixer."""
    found: dict[tuple[str, int], Line] = {}
    order: list[str] = []
    for line in lines:
        place = line["label"], line["width"]
        order += [] if line["label"] in order else [line["label"]]
        if place not in found or line["accuracy"] > found[place]["accuracy"]:
            found[place] = line
    return sorted(found.values(), key=lambda line: (order.index(line["label"]), line["state_bytes"]))


def table(lines: Sequence[Line]) -> list[str]:
    """Rows to read: the best of each mixer and width, accuracy in all and by test."""
    if not lines:
        return []
    tests = [f"{test['pairs']}/{test['length']}" for test in lines[0]["tests"]]
    rows = [["mixer", "width", "state bytes", "lr", "accuracy", *tests]]
    for line in lines:
        by_test = [f"{test['accuracy']:.3f}" for test in line["tests"]]
        told = [line["label"], str(line["width"]), f"{line['state_bytes']:,}", f"{line['lr']:.1e}"]
        rows.append([*told, f"{line['accuracy']:.3f}", *by_test])
    widths = [max(map(len, column)) for column in zip(*rows)]
    first, *others = widths
    return [
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others))]) for row in rows
    ]
