"""A run's folder: its resolved recipe, and whether another recipe may go on in it.

recipe.toml   metrics.jsonl   tensorboard/   checkpoints/step-N/   cache/   run.lock (while it runs)
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.recipe.parse import dump, flatten
from torchlinearmoe.recipe.schema import Recipe

FREE_SECTIONS = ("parallel", "metrics", "checkpoint")
FREE_KEYS = ("training.steps", "training.tokens", "training.output_dir", "data.on_change")
"""What may change when a run goes on. The folder was found already: it may have moved, or be written another way."""
DATA_PLACES = ("data.paths", "data.cache")
"""Where the data lie: free as well where a checkpoint knows them by their fingerprint."""


def check_same_run(saved: Recipe, now: Recipe, *, data_known: bool) -> None:
    """Raise RecipeError naming the first key that differs and may not.

    data_known: the data are compared by themselves, wherever they lie.
    """
    before, after = flatten(saved), flatten(now)
    free_keys = (*FREE_KEYS, *DATA_PLACES) if data_known else FREE_KEYS
    for key in sorted(before):
        free = key in free_keys or key.split(".")[0] in FREE_SECTIONS
        if not free and before[key] != after[key]:
            raise RecipeError(
                f"{key} = {after[key]!r}: the checkpoint to resume was made with {before[key]!r}; set it back, or "
                "start another run in another training.output_dir"
            )


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
    found = find_tokenizer(Path(source).expanduser())
    if found is None:
        raise RecipeError(
            f"data.tokenizer = '': checkpoint.init_from = '{source}' holds no tokenizer; name the file of its tokenizer"
        )
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, tokenizer=str(found)))


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """Write `recipe.toml`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".recipe.toml.{os.getpid()}"
    aside.write_text(dump(recipe), encoding="utf-8")
    aside.replace(folder / "recipe.toml")
