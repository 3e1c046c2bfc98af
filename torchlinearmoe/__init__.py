"""A pure PyTorch trainer for Linear-MoE language models.

from torchlinearmoe import load_recipe, build_model, load_model, MIXERS, FAMILIES
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchlinearmoe.checkpoint.model import load_model
    from torchlinearmoe.families import FAMILIES
    from torchlinearmoe.mixers import MIXERS
    from torchlinearmoe.models.decoder import build_model
    from torchlinearmoe.recipe import RecipeError, load_recipe

_HOMES = {
    "FAMILIES": "torchlinearmoe.families",
    "MIXERS": "torchlinearmoe.mixers",
    "RecipeError": "torchlinearmoe.recipe",
    "build_model": "torchlinearmoe.models.decoder",
    "load_model": "torchlinearmoe.checkpoint.model",
    "load_recipe": "torchlinearmoe.recipe",
}

__all__ = ["FAMILIES", "MIXERS", "RecipeError", "build_model", "load_model", "load_recipe"]


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use, so that `import torchlinearmoe` stays quick."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'torchlinearmoe' has no attribute '{name}'")
