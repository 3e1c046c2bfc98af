"""Folders that training writes, told from others by what is in them.

    run            recipe.toml   metrics.jsonl   tensorboard/   checkpoints/   profile/   cache/   run.lock
    checkpoint     recipe.toml   state.json   .metadata   tokenizer/   *.distcp

The cached tokens of a text are `data/store.py`'s.
"""

from __future__ import annotations

from pathlib import Path

RUN_PARTS = ("recipe.toml", "metrics.jsonl", "tensorboard", "checkpoints", "profile", "run.lock")
"""What lies in a run's folder, less the cache, which may lie anywhere."""


def is_run(folder: Path) -> bool:
    """Whether a run has written into `folder`."""
    started = (folder / "metrics.jsonl").is_file() or (folder / "checkpoints").is_dir()
    return started and (folder / "recipe.toml").is_file()


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is a checkpoint, complete or not."""
    return any(folder.glob("*.distcp"))
