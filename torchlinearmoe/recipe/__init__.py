"""Recipes: what a run is, as one TOML file.

`schema.py` declares the sections; it is a leaf, which every room may import. `parse.py` reads and writes them and
`validate.py` refuses what cannot run: these know mixers and families and stand above them, so their names are imported
on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.recipe.schema import (
    CheckpointRecipe,
    DataRecipe,
    EvaluationRecipe,
    MetricsRecipe,
    ModelRecipe,
    MoERecipe,
    OptimizerRecipe,
    ParallelRecipe,
    Recipe,
    TrainingRecipe,
)

if TYPE_CHECKING:
    from torchlinearmoe.recipe.parse import dump, load_recipe, resolve

__all__ = [
    "CheckpointRecipe",
    "DataRecipe",
    "EvaluationRecipe",
    "MetricsRecipe",
    "ModelRecipe",
    "MoERecipe",
    "OptimizerRecipe",
    "ParallelRecipe",
    "Recipe",
    "RecipeError",
    "TrainingRecipe",
    "dump",
    "load_recipe",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if name in ("dump", "load_recipe", "resolve"):
        return getattr(importlib.import_module("torchlinearmoe.recipe.parse"), name)
    raise AttributeError(f"module 'torchlinearmoe.recipe' has no attribute '{name}'")
