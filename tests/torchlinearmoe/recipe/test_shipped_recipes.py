"""Every recipe that ships runs from a bare clone: it needs no file of the user's, and its model can be laid out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torchlinearmoe import FAMILIES, load_recipe
from torchlinearmoe.data.tokenizer import check_vocabulary, load_tokenizer
from torchlinearmoe.models.layer_mixers import layer_mixers
from torchlinearmoe.planning import plan

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_needs_nothing_but_the_clone(path: Path):
    recipe = load_recipe(path)
    assert all(Path(name).exists() for name in recipe.data.paths)
    check_vocabulary(load_tokenizer(recipe.data.tokenizer), recipe.model.vocab_size)
    assert recipe.training.sequence_length <= recipe.model.max_length
    found = plan(recipe, max(2, recipe.parallel.context), torch.bfloat16)
    assert found["parameters"]["total"] >= found["parameters"]["active"] > 0
    assert {kind["mixer"] for kind in found["parameters"]["kinds"]} == set(layer_mixers(recipe.model))


def test_every_family_has_a_recipe():
    assert {load_recipe(path).model.family for path in RECIPES} == set(FAMILIES)
