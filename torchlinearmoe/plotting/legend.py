"""Names of several runs, made of what differs in their recipes.

model.mixer = "gla"    optimizer.lr = 0.001           mixer=gla, lr=0.001
model.mixer = "rwkv7"  optimizer.lr = 0.003           mixer=rwkv7, lr=0.003
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torchlinearmoe.families.base import DIMENSIONS
from torchlinearmoe.plotting.run import Run
from torchlinearmoe.recipe import Recipe
from torchlinearmoe.recipe.parse import read_keys

SILENT = ("metrics.", "evaluation.", "checkpoint.", "training.output_dir", "data.cache", "data.workers")
"""Beginnings of keys that say nothing of what a run learns."""
MOST = 4
"""Keys in a name; beyond them the folder is named."""


def labels(runs: Sequence[Run]) -> list[str]:
    """A name for each run: the values of what differs, else the folder; no two alike for different folders."""
    folders = [run.folder.name or str(run.folder.resolve().name) for run in runs]
    recipes = [run.recipe for run in runs]
    tables = [_table(recipe) for recipe in recipes if recipe is not None]
    if len(tables) < len(runs) or len(runs) == 1:
        return _told_apart(folders, runs)
    keys = _differing(tables)
    short = {key: key.rpartition(".")[2] for key in keys}
    twice = {name for name, count in Counter(short.values()).items() if count > 1}
    names = []
    for table, folder in zip(tables, folders):
        parts = [f"{key if short[key] in twice else short[key]}={_shown(table[key])}" for key in keys if key in table]
        rest = [f"... ({folder})"] if len(parts) > MOST else []
        names.append(", ".join(parts[:MOST] + rest) or folder)
    counts = Counter(names)
    return _told_apart([f"{n} ({folder})" if counts[n] > 1 else n for n, folder in zip(names, folders)], runs)


def _told_apart(names: list[str], runs: Sequence[Run]) -> list[str]:
    counts = Counter(names)
    return [f"{run.folder}" if counts[name] > 1 else name for name, run in zip(names, runs)]


def _table(recipe: Recipe) -> dict[str, Any]:
    """The keys of a recipe that are read, by name."""
    return {key: value for key, value in read_keys(recipe).items() if not key.startswith(SILENT)}


def _differing(tables: Sequence[dict[str, Any]]) -> list[str]:
    """Keys whose values differ among the runs that read them.

    Where family or size does, what they bring is no news. So are the options of a mixer that one of the runs alone has.
    """
    keys = dict.fromkeys(key for table in tables for key in table)
    found = [key for key in keys if len({repr(table[key]) for table in tables if key in table}) > 1]
    if {"model.family", "model.size"} & set(found):
        brought = {f"{section}.{key}" for section, names in DIMENSIONS.items() for key in names}
        found = [key for key in found if key not in brought]
    return found


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "+".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
