"""A run's recipe on disk, and which recipe may go on where it stopped."""

from pathlib import Path
from typing import Any

import pytest

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.recipe import Recipe, load_recipe, resolve
from torchlinearmoe.recipe.parse import flatten
from torchlinearmoe.run_folder import check_same_run, with_tokens_per_step, write_recipe


def recipe(**sections: dict[str, Any]) -> Recipe:
    return resolve({"training": {"steps": 5, "tokens_per_step": 4096}, **sections})


def test_keys_are_those_of_the_file() -> None:
    keys = flatten(recipe())
    assert {"model.num_layers", "moe.top_k", "mixer.hgrn2.conv", "optimizer.betas", "training.steps"} <= keys.keys()
    assert not any(key.startswith(("model.moe", "model.mixer_options")) for key in keys)
    assert keys["training.steps"] == 5


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"steps": 9, "tokens_per_step": 4096}},
        {"training": {"tokens": 9999, "tokens_per_step": 4096}},
        {"training": {"steps": 5, "tokens_per_step": 4096, "output_dir": "elsewhere"}},
        {"parallel": {"data_replicate": 2}},
        {"metrics": {"interval": 3, "tensorboard": False}},
        {"checkpoint": {"interval": 3, "resume": "never"}},
        {"mixer": {"linear_attention": {"conv": 4}}},
    ],
)
def test_how_long_where_and_what_is_watched_may_change(sections: dict[str, Any]) -> None:
    check_same_run(recipe(), recipe(**sections), data_known=False)


def test_known_data_may_lie_elsewhere() -> None:
    check_same_run(recipe(), recipe(data={"paths": ["a"], "cache": "b"}), data_known=True)
    with pytest.raises(RecipeError, match="data.validation_fraction"):
        check_same_run(recipe(), recipe(data={"validation_fraction": 0.2}), data_known=True)


@pytest.mark.parametrize(
    "sections, told",
    [
        ({"model": {"num_layers": 2}}, "model.num_layers = 2: the checkpoint to resume was made with 4;"),
        ({"moe": {"balance": "bias"}}, "moe.balance = 'bias': the checkpoint to resume was made with 'loss';"),
        ({"mixer": {"hgrn2": {"conv": 4}}}, "mixer.hgrn2.conv = 4: the checkpoint to resume was made with 0;"),
        (
            {"optimizer": {"warmup_steps": 3}},
            "optimizer.warmup_steps = 3: the checkpoint to resume was made with None;",
        ),
        ({"data": {"paths": ["a"]}}, r"data.paths = \('a',\): the checkpoint to resume was made with \(\);"),
    ],
)
def test_anything_else_is_refused_by_its_key(sections: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        check_same_run(recipe(), recipe(**sections), data_known=False)


def test_the_recipe_is_written_whole_over_the_old_one(tmp_path: Path) -> None:
    resolved = with_tokens_per_step(recipe(mixer={"hgrn2": {"conv": 4}}), 12288)
    assert resolved.training.tokens_per_step == 12288
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.toml").write_text("old")
    write_recipe(resolved, tmp_path / "run")
    assert load_recipe(tmp_path / "run/recipe.toml") == resolved
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["recipe.toml"]
