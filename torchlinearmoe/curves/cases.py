"""The models: a mixer each, perhaps with options, or flash-linear-attention's model of the same layer.

gla                        ours
mamba2:state=64,expand=1.5 with options of `[mixer.mamba2]`
fla/gla                    the whole model is flash-linear-attention's, of equal shapes: `peer.py`
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchlinearmoe.curves.peer import PEERS
from torchlinearmoe.curves.settings import TABLES
from torchlinearmoe.errors import RecipeError, nearest
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.recipe import Recipe, resolve
from torchlinearmoe.recipe.parse import parse_overrides

THEIRS = "fla/"


@dataclass(frozen=True)
class Case:
    """A model to train."""

    label: str
    """As it was named."""
    mixer: str
    theirs: bool
    """Whether the model is flash-linear-attention's."""
    recipe: Recipe
    """Its `training.output_dir` is the case's folder."""

    @property
    def folder(self) -> Path:
        """Where it is trained."""
        return Path(self.recipe.training.output_dir)


def build_cases(
    labels: Sequence[str], tokens: Path, tokenizer: Path, output: Path, overrides: Sequence[str] = ()
) -> list[Case]:
    """All of them, each once. Raises RecipeError for one that cannot be built."""
    more = parse_overrides(overrides)
    return [_case(label, tokens, tokenizer, output, more) for label in dict.fromkeys(labels)]


def _case(label: str, tokens: Path, tokenizer: Path, output: Path, more: Mapping[str, Any]) -> Case:
    theirs = label.startswith(THEIRS)
    name, _, options = label.removeprefix(THEIRS).partition(":")
    known = PEERS if theirs else MIXERS
    if name not in known:
        raise RecipeError(f"--models {label}: unknown mixer; {nearest(name, known)}")
    if theirs and options:
        raise RecipeError(f"--models {label}: flash-linear-attention's model has the defaults; leave the options out")
    given = parse_overrides([f"mixer.{name}.{option}" for option in options.split(",") if option])
    tables = copy.deepcopy(TABLES)
    tables["model"] |= {"mixer": name}
    tables["mixer"] = {name: given.get("mixer", {}).get(name, {})}
    for section, table in more.items():
        tables[section] = {**tables.get(section, {}), **table}
    told = json.dumps([label, tables], sort_keys=True)
    key = hashlib.blake2b(told.encode(), digest_size=4).hexdigest()
    tables["data"] |= {"paths": [str(tokens)], "tokenizer": str(tokenizer)}
    folder = f"{re.sub('[^a-z0-9_.=]+', '-', label)}-{key}"
    tables.setdefault("training", {})["output_dir"] = str(output / folder)
    return Case(label, name, theirs, resolve(tables))
