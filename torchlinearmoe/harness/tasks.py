"""Tasks by their names: lm-eval's own, files of task YAML, and those made here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.errors import UserError, nearest
from torchlinearmoe.harness.local import LOCAL, local_task


class Tasks:
    """What a model is asked. Needs lm-eval."""

    def __init__(self, names: Iterable[str], tokenizer: Tokenizer, key: str, include_path: str | None = None) -> None:
        """`local` stands for all that are made here; `include_path` is a folder of more task YAML.

        Raises UserError, one line that begins with `key`, for a name that is none.
        """
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

        if include_path is not None and not Path(include_path).is_dir():
            raise UserError(f"--include-path {include_path}: no such folder")
        given = list(dict.fromkeys(filter(None, map(str.strip, names))))
        if not given:
            raise UserError(f"{key}: names none; give local, or names of lm-eval's tasks")
        self.names = list(dict.fromkeys(each for name in given for each in (LOCAL if name == "local" else [name])))
        self.tokenizer = tokenizer
        others = [name for name in self.names if name not in LOCAL]
        # Thousands of files are read for its index.
        self.manager = TaskManager(include_path=include_path, include_defaults=bool(others))
        for name in others:
            if name not in self.manager.task_index and not Path(name).is_file():
                close, _, _ = nearest(name, ["local", *LOCAL, *self.manager.task_index]).partition("legal: ")
                told = close.strip() or "python -m lm_eval ls tasks lists lm-eval's"
                raise UserError(f"{key} {name}: no such task, and no file of one; {told}")

    def made(self) -> list[Any]:
        """As lm-eval takes them: names and files, and our own made anew."""
        return [local_task(name, self.tokenizer) if name in LOCAL else name for name in self.names]
