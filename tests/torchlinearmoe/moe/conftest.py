"""Fixtures of the MoE tests: recipes and filled layers."""

from collections.abc import Callable

import pytest
import torch

from torchlinearmoe.moe import MoE
from torchlinearmoe.recipe.schema import MoERecipe

Build = Callable[..., MoE]


@pytest.fixture
def build() -> Build:
    """`build(width, dtype=..., activation=..., **fields)`: an MoE layer with normal random weights of visible size."""

    def make(width: int, dtype: torch.dtype = torch.float64, **fields) -> MoE:
        defaults = {"num_experts": 6, "top_k": 2, "hidden_size": 8, "shared_hidden_size": 0, "shared_gate": False}
        activation = fields.pop("activation", "swiglu")
        layer = MoE(width, MoERecipe(**{"renormalize": True, **defaults, **fields}), 0.02, 0.02, activation).to(dtype)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(0, 0.5)
        return layer

    return make
