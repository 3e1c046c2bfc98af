"""`metrics.jsonl`: one JSON object a line, one line a logged step, in the order of the steps.

The file is the run's memory: readable while the run goes on (every line is flushed), strict JSON (a value that is
not finite becomes null), and without repeated steps after a resume (it is cut back to the resumed step first).
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Record:
    """Appends lines to the file at `path`, making its folder. One process writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append `line` (numbers, strings, None, or lists of them) and flush it."""
        self._file.write(json.dumps({key: _finite(value) for key, value in line.items()}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()


def truncate_after(path: str | Path, step: int) -> None:
    """Keep only the lines of the file at `path` whose `step` is at most `step`.

    A line that is not a JSON object with a step, such as the torn last line of a killed run, is dropped. The new
    content is written beside the file and renamed over it, so the file is whole at any moment. No file: nothing.
    """
    path = Path(path)
    if not path.exists():
        return
    aside = path.with_name(path.name + ".cut")
    try:
        with path.open(encoding="utf-8", errors="replace") as old, aside.open("w", encoding="utf-8") as new:
            for line in old:
                found = _step_of(line)
                if found is not None and found <= step:
                    new.write(line if line.endswith("\n") else line + "\n")
            new.flush()
            os.fsync(new.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _step_of(line: str) -> int | None:
    try:
        content = json.loads(line)
    except json.JSONDecodeError:
        return None
    step = content.get("step") if isinstance(content, dict) else None
    return step if isinstance(step, int) else None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
