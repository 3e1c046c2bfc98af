"""Small float64 decoders for the tests of this folder: every mixer alone, as a hybrid, and all of them in one model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchlinearmoe import MIXERS, build_model
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.recipe import ModelRecipe, resolve

VOCAB = 61

LAYOUTS: list[dict[str, Any]] = [
    *({"mixer": name, "layout": "L", "num_layers": 2} for name in MIXERS.names()),
    *({"mixer": name, "layout": "LLLN", "num_layers": 4} for name in MIXERS.names()),
    {"mixers": MIXERS.names()},
]


def _name(model: dict[str, Any]) -> str:
    return "all" if "mixers" in model else f"{model['mixer']}-{model['layout']}"


every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=_name)


def small_recipe(model: dict[str, Any], moe: dict[str, Any] | None = None, **mixer: Any) -> ModelRecipe:
    """`[model]` of width 32 with two heads of 16 and 61 tokens."""
    sizes = {"hidden_size": 32, "num_heads": 2, "num_kv_heads": 1, "vocab_size": VOCAB, "max_length": 100}
    experts = {"num_experts": 4, "top_k": 2, "hidden_size": 16, **(moe or {})}
    return resolve({"model": sizes | model, "moe": experts, "mixer": mixer, "training": {"steps": 1}}).model


def small_model(
    model: dict[str, Any], moe: dict[str, Any] | None = None, dtype: torch.dtype = torch.float64, **mixer: Any
) -> Decoder:
    """The decoder, its parameters moved away from neutral initial values."""
    decoder = build_model(small_recipe(model, moe, **mixer), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return decoder.to(dtype)


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed + 7))


def relative(x: torch.Tensor, expected: torch.Tensor) -> float:
    """|x - expected| / |expected| in the L2 norm; inf where x is not finite."""
    error = (x.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    return float(error) if bool(error.isfinite()) else float("inf")
