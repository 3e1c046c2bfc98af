"""A run's recipe on disk."""

from pathlib import Path
from typing import Any

from torchlinearmoe.recipe import Recipe, load_recipe, resolve
from torchlinearmoe.recipe.parse import flatten
from torchlinearmoe.run_folder import with_tokens_per_step, write_recipe


def recipe(**sections: dict[str, Any]) -> Recipe:
    return resolve({"training": {"steps": 5, "tokens_per_step": 4096}, **sections})


def test_keys_are_those_of_the_file() -> None:
    keys = flatten(recipe())
    assert {"model.num_layers", "moe.top_k", "mixer.hgrn2.conv", "optimizer.betas", "training.steps"} <= keys.keys()
    assert not any(key.startswith(("model.moe", "model.mixer_options")) for key in keys)
    assert keys["training.steps"] == 5


def test_the_recipe_is_written_whole_over_the_old_one(tmp_path: Path) -> None:
    resolved = with_tokens_per_step(recipe(mixer={"hgrn2": {"conv": 4}}), 12288)
    assert resolved.training.tokens_per_step == 12288
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.toml").write_text("old")
    write_recipe(resolved, tmp_path / "run")
    assert load_recipe(tmp_path / "run/recipe.toml") == resolved
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["recipe.toml"]
