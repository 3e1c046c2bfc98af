"""Sizes that no model has are refused by their key before anything is built, and every model there is fits."""

from __future__ import annotations

import dataclasses
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from torchlinearmoe import MIXERS, load_recipe
from torchlinearmoe.errors import RecipeError, divisors
from torchlinearmoe.families import FAMILIES
from torchlinearmoe.recipe import resolve
from torchlinearmoe.recipe.validate import LIMITS

OPTIONS = [
    (f"mixer.{name}", field.name)
    for name in MIXERS.names()
    for field in dataclasses.fields(MIXERS[name].Options)
    if field.type == "int" or field.name.startswith("expand")
]


def tables(section: str, key: str, value: Any) -> dict[str, Any]:
    *outer, last = section.split(".")
    found: dict[str, Any] = {last: {key: value}}
    for name in reversed(outer):
        found = {name: found}
    return {"training": {"steps": 1}} | found | ({"training": {"steps": 1, key: value}} if last == "training" else {})


@pytest.mark.parametrize(
    ("section", "key"), [*((section, key) for section in LIMITS for key in LIMITS[section]), *OPTIONS]
)
@pytest.mark.parametrize("value", [10**12, 2**63 - 1])
def test_an_absurd_size_is_named(section: str, key: str, value: int) -> None:
    with pytest.raises(RecipeError, match=rf"^{section}\.{key} = [\d.e+]+: must be at most \d+$"):
        resolve(tables(section, key, value))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("model", "num_layers", 10**7), ("moe", "num_experts", 10**9), ("model", "vocab_size", 10**12)],
)
def test_the_command_line_is_bounded_too(section: str, key: str, value: int, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("[training]\nsteps = 1\n")
    with pytest.raises(RecipeError, match=rf"^{section}\.{key} = {value}: must be at most"):
        load_recipe(tmp_path / "recipe.toml", [f"--{section}.{key}={value}"])


def test_absurd_layouts_are_named() -> None:
    with pytest.raises(RecipeError, match="model.layout: names 1000000 layers"):
        resolve(tables("model", "layout", "LN" * 500_000))
    with pytest.raises(RecipeError, match="model.num_layers = 100000"):
        resolve(tables("model", "mixers", ["hgrn2"] * 100_000))


@pytest.mark.parametrize("size", [(name, size) for name, family in FAMILIES.items() for size in family.presets])
def test_presets_are_far_below_the_limits(size: tuple[str, str]) -> None:
    preset = FAMILIES[size[0]].preset(size[1])
    for section in ("model", "moe"):
        for key, limit in LIMITS[section].items():
            assert 8 * preset[section].get(key, 0) <= limit


def test_an_endless_recipe_is_refused_and_a_pipe_is_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="/dev/zero: not a recipe: more than 16777216 bytes"):
        load_recipe("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("[training]\nsteps = 7\n"))
    writer.start()
    assert load_recipe(tmp_path / "pipe").training.steps == 7
    writer.join()


def test_divisors_of_large_numbers_are_told_at_once() -> None:
    for number in range(1, 200):
        wanted = [str(n) for n in range(1, number + 1) if number % n == 0]
        assert divisors(number) == ", ".join(wanted)
    assert divisors(2**30).endswith("536870912, 1073741824") and divisors(12, 18) == "1, 2, 3, 6"
