"""Linear layers whose products are in float8: `training.float8`, by torchao.

    x [T, N], w [M, N]      y = x w^T, d_x = d_y w, d_w = d_y^T x: both sides of each rounded to float8 (e4m3)
    rowwise                 every row and column that is summed over has a scale of its own, a power of two

Modules say themselves which of their layers may (`module.Module.float8`). Such a layer is exchanged for torchao's,
which takes over its parameters: names, values, sharding and checkpoints stay as they are, and what FSDP gathers is
rounded after it was gathered. Tensor-parallel ranks scale the rows of their own share, so a rank's partial sums are
those of smaller layers.

Products in float8 are of multiples of 16: inputs, outputs, and the tokens that the gradient of a weight sums over.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Shard

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.initialize import initializers_of, set_initializers
from torchlinearmoe.kernels.choose import this_machine
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.module import traits
from torchlinearmoe.parallel.tensor import declared_placements
from torchlinearmoe.recipe.schema import Recipe

MULTIPLE = 16
LEAST_CAPABILITY = (8, 9)
"""CUDA compute capability: Ada and Hopper are the first with products of float8."""


def float8_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of `model` that may compute in float8, by their paths."""
    for path, owner in model.named_modules():
        for name in traits(owner).float8:
            layer = getattr(owner, name, None)
            if layer is not None:
                assert isinstance(layer, nn.Linear), f"{path}.{name}"
                yield f"{path}.{name}" if path else name, layer


def check_sizes(model: Decoder, recipe: Recipe) -> None:
    """Raise RecipeError for the first size that float8 does not take; `model` is not split yet."""
    training, parallel = recipe.training, recipe.parallel
    if training.float8 == "none":
        return
    tokens = training.sequence_length * training.micro_batch_size // parallel.context
    if tokens % MULTIPLE:
        raise _refusal(
            recipe,
            f"{tokens} tokens of a micro-batch and context-parallel rank are no multiple of {MULTIPLE}; change "
            "training.sequence_length",
        )
    placements = declared_placements(model)
    for path, layer in float8_layers(model):
        shard = placements[f"{path}.weight"]
        sizes = {"outputs": layer.out_features, "inputs": layer.in_features}
        if parallel.tensor > 1 and isinstance(shard, Shard):
            split = ("outputs", "inputs")[shard.dim]
            sizes[f"{split} of each of parallel.tensor = {parallel.tensor} ranks"] = sizes.pop(split) // parallel.tensor
        for what, size in sizes.items():
            if size % MULTIPLE:
                raise _refusal(recipe, f"{path} has {size} {what}, no multiple of {MULTIPLE}; change the model's sizes")


def check_machine(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> None:
    """Raise RecipeError where this machine cannot compute in float8, or a run in `dtype` does not."""
    if recipe.training.float8 == "none":
        return
    if importlib.util.find_spec("torchao") is None:
        raise _refusal(recipe, "torchao cannot be imported; pip install torchlinearmoe[float8]")
    if device.type != "cuda":
        raise _refusal(recipe, f"it needs a GPU, training runs on the {device.type}; use one")
    capability = this_machine().capability
    if capability < LEAST_CAPABILITY:
        wanted, found = (".".join(map(str, pair)) for pair in (LEAST_CAPABILITY, capability))
        raise _refusal(recipe, f"it needs compute capability {wanted}, this GPU has {found}; use another GPU")
    if dtype != torch.bfloat16:
        kind = str(dtype).removeprefix("torch.")
        raise _refusal(
            recipe, f"what is around it computes in bfloat16, not in {kind}; set training.dtype = 'bfloat16'"
        )


def _refusal(recipe: Recipe, reason: str) -> RecipeError:
    return RecipeError(f"training.float8 = '{recipe.training.float8}': {reason}, or set training.float8 = 'none'")


def convert_to_float8(model: nn.Module, kind: str) -> None:
    """Exchange the layers of `model`, on the meta device, for torchao's, in place; kind: of `training.float8`."""
    from torchao.float8 import convert_to_float8_training

    found = dict(float8_layers(model))
    chosen = set(found.values())
    convert_to_float8_training(model, config=scaling(kind), module_filter_fn=lambda layer, _: layer in chosen)
    for path, layer in found.items():
        set_initializers(model.get_submodule(path), **initializers_of(layer))


def scaling(kind: str) -> Any:
    """torchao's configuration of a kind."""
    from torchao.float8 import Float8LinearConfig

    return Float8LinearConfig.from_recipe_name(kind)
