"""The models of a sweep: every mixer at every width with every learning rate.

A mixer is named as `mamba2` or `mamba2:state=16,expand=1.0`, with options of its section. The initial values grow with
1 / sqrt(width), 0.02 at a width of 1024.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from torchlinearmoe.errors import RecipeError, nearest
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.recall.settings import CONV, Setting
from torchlinearmoe.recipe import Recipe, resolve
from torchlinearmoe.recipe.parse import parse_overrides

INIT = 0.64
"""Standard deviation of initial weights, times the root of the width."""


@dataclass(frozen=True)
class Case:
    """A model to train."""

    label: str
    """The mixer, with the options that were given."""
    mixer: str
    width: int
    lr: float
    recipe: Recipe
    key: str
    """Tells it from every other, in this setting and others."""


def build_cases(
    setting: Setting, mixers: Sequence[str], widths: Sequence[int], lrs: Sequence[float], overrides: Sequence[str] = ()
) -> list[Case]:
    """All of them, mixer by mixer, each learning rate at all widths before the next.

    Raises RecipeError for one that cannot be built.
    """
    more = parse_overrides(overrides)
    return [_case(setting, label, width, lr, more) for label in mixers for lr in lrs for width in widths]


def _case(setting: Setting, label: str, width: int, lr: float, more: Mapping[str, Any]) -> Case:
    name, _, options = label.partition(":")
    if name not in MIXERS:
        raise RecipeError(f"--mixers {label}: unknown mixer; {nearest(name, MIXERS)}")
    given = parse_overrides([f"mixer.{name}.{option}" for option in options.split(",") if option])
    tables = copy.deepcopy(setting.tables)
    tables["model"] |= {"mixer": name, "hidden_size": width, "head_dim": width // 2, "init_std": INIT * width**-0.5}
    tables["optimizer"] |= {"lr": lr}
    conv = {"conv": CONV} if "conv" in {entry.name for entry in fields(MIXERS[name].Options)} else {}
    tables["mixer"] = {name: {**conv, **given.get("mixer", {}).get(name, {})}}
    for section, table in more.items():
        tables[section] = {**tables.get(section, {}), **table}
    told = json.dumps([tables, [asdict(test) for test in setting.tests], setting.enough], sort_keys=True)
    key = hashlib.blake2b(told.encode(), digest_size=8).hexdigest()
    return Case(label, name, width, lr, resolve(tables), key)
