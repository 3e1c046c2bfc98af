"""Recipes that earlier versions wrote are read, and every key means what it meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from saved_recipes import keys_at_their_default
from saved_run import HERE

from torchlinearmoe.models.layer_mixers import used_sections
from torchlinearmoe.recipe import load_recipe
from torchlinearmoe.recipe.parse import MOVED, flatten
from torchlinearmoe.run_folder import write_recipe

WRITTEN = sorted((HERE / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_a_written_recipe_resolves_to_the_same_values(path: Path, tmp_path: Path) -> None:
    recorded = json.loads(path.with_suffix(".json").read_text())
    recipe = load_recipe(path)
    found = json.loads(json.dumps(flatten(recipe)))
    for old, (mixer, key) in MOVED.items():
        assert old not in found
        if old not in recorded:  # written since
            continue
        value = recorded.pop(old)
        assert mixer not in used_sections(recipe.model) or found[f"mixer.{mixer}.{key}"] == value
    assert {key: found.get(key, "no such key") for key in recorded} == recorded
    write_recipe(recipe, tmp_path)
    assert load_recipe(tmp_path / "recipe.toml") == recipe


def test_together_they_say_something_with_every_key_they_were_made_for() -> None:
    assert len(WRITTEN) >= 3
    recorded = {key for path in WRITTEN for key in json.loads(path.with_suffix(".json").read_text())}
    assert not recorded & set(keys_at_their_default())
