"""A run's folder and its resolved recipe.

recipe.toml   metrics.jsonl   tensorboard/   checkpoints/step-N/   cache/   run.lock (while it runs)
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from torchlinearmoe.disk import expanded
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.recipe.parse import dump
from torchlinearmoe.recipe.schema import Recipe


def at_home(recipe: Recipe) -> Recipe:
    """The recipe with `~` written out in `training.output_dir` and `checkpoint.resume`: a shell leaves it after `=`.

    Raises UserError that names the key where that user has no home here.
    """
    training = dataclasses.replace(
        recipe.training, output_dir=str(expanded(recipe.training.output_dir, "training.output_dir"))
    )
    checkpoint = dataclasses.replace(
        recipe.checkpoint, resume=str(expanded(recipe.checkpoint.resume, "checkpoint.resume"))
    )
    return dataclasses.replace(recipe, training=training, checkpoint=checkpoint)


def with_tokens_per_step(recipe: Recipe, tokens: int) -> Recipe:
    """The recipe with `training.tokens_per_step` written out."""
    return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, tokens_per_step=tokens))


def with_tokenizer(recipe: Recipe) -> Recipe:
    """The recipe with `data.tokenizer` written out where it is the one of `checkpoint.init_from`.

    Raises RecipeError when there is none: weights mean nothing under another tokenizer.
    """
    from torchlinearmoe.checkpoint.model import find_tokenizer

    source = recipe.checkpoint.init_from
    if recipe.data.tokenizer or not source:
        return recipe
    found = find_tokenizer(expanded(source, "checkpoint.init_from"))
    if found is None:
        raise RecipeError(
            f"data.tokenizer = '': checkpoint.init_from = '{source}' holds no tokenizer; name the file of its tokenizer"
        )
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, tokenizer=str(found)))


def with_begin_of_text(recipe: Recipe, begin_of_text: int | None) -> Recipe:
    """The recipe with `data.begin_of_text` written out where documents start with that token."""
    if begin_of_text is None:
        return recipe
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, begin_of_text=True))


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """Write `recipe.toml`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".recipe.toml.{os.getpid()}"
    try:
        aside.write_text(dump(recipe), encoding="utf-8")
        aside.replace(folder / "recipe.toml")
    finally:
        aside.unlink(missing_ok=True)
