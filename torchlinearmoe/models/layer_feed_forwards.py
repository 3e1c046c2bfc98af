"""Which feed-forward each layer has, from `model.feed_forwards` and `moe.first_dense_layers`."""

from __future__ import annotations

from torchlinearmoe.recipe.schema import ModelRecipe

EXPERTS, DENSE, NONE = "E", "-", "."
KINDS = (EXPERTS, DENSE, NONE)


def feed_forwards(model: ModelRecipe) -> list[str]:
    """A kind for each layer; `E` stands for experts alone."""
    pattern, first = model.feed_forwards, model.moe.first_dense_layers if model.moe.num_experts else model.num_layers
    letters = (pattern[layer % len(pattern)] for layer in range(model.num_layers))
    return [DENSE if kind == EXPERTS and layer < first else kind for layer, kind in enumerate(letters)]
