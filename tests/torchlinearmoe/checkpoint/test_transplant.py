"""What a model may start from: weights that compute under its recipe what they computed under their own."""

import re
from typing import Any

import pytest

from torchlinearmoe.checkpoint.transplant import check_recipes
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.recipe import ModelRecipe, resolve

EXPERTS = {"num_experts": 4, "top_k": 2, "hidden_size": 160}


def model(pattern: str, moe: dict[str, Any] | None = None) -> ModelRecipe:
    tables = {"model": {"feed_forwards": pattern, "num_layers": 4}, "training": {"steps": 1}}
    return resolve(tables | {"moe": moe or {"num_experts": 0, "top_k": 0}}).model


@pytest.mark.parametrize(
    ("target", "source"),
    [
        (("E.", EXPERTS), ("E.E.", EXPERTS)),
        (("--EE", EXPERTS), ("--EEE", EXPERTS)),
        (("EE.-", EXPERTS), ("--.-", None)),
        (("E", None), ("-", None)),
    ],
)
def test_a_pattern_may_be_written_another_way(target, source) -> None:
    check_recipes(model(*target), model(*source), "there")


@pytest.mark.parametrize(
    ("target", "source"),
    [
        (("E.", EXPERTS), ("EE..", EXPERTS)),
        (("E-", EXPERTS), ("EE", EXPERTS)),
        (("E", EXPERTS), ("-.", None)),
        (("-", None), ("-.", None)),
    ],
)
def test_layers_keep_the_feed_forwards_they_had(target, source) -> None:
    said = f"model.feed_forwards = '{target[0]}': there, named by checkpoint.init_from, has '{source[0]}'"
    with pytest.raises(RecipeError, match=re.escape(said)):
        check_recipes(model(*target), model(*source), "there")
