"""Recipes: what a run is, as one TOML file.

`schema.py` declares the sections, `parse.py` reads and writes them, `layers.py` says which mixer each layer runs,
`validate.py` refuses what cannot run.
"""

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.recipe.layers import layer_mixers, used_mixers
from torchlinearmoe.recipe.parse import dump, load_recipe, resolve
from torchlinearmoe.recipe.schema import (
    CheckpointRecipe,
    DataRecipe,
    MetricsRecipe,
    ModelRecipe,
    MoERecipe,
    OptimizerRecipe,
    ParallelRecipe,
    Recipe,
    TrainingRecipe,
)

__all__ = [
    "CheckpointRecipe",
    "DataRecipe",
    "MetricsRecipe",
    "ModelRecipe",
    "MoERecipe",
    "OptimizerRecipe",
    "ParallelRecipe",
    "Recipe",
    "RecipeError",
    "TrainingRecipe",
    "dump",
    "layer_mixers",
    "load_recipe",
    "resolve",
    "used_mixers",
]
