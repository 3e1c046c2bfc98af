"""The order in which parallelism is applied; the tour of this folder starts here.

meta model -> expert parallelism -> compile regions -> FSDP -> allocate this rank's shards -> draw its initial values
"""

from __future__ import annotations

import torch

from torchlinearmoe.initialize import initialize
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.moe.balance import Balance, TokenLayout
from torchlinearmoe.parallel.compile import compile_regions
from torchlinearmoe.parallel.expert import apply_expert_parallel
from torchlinearmoe.parallel.fsdp import apply_fsdp
from torchlinearmoe.parallel.mesh import Meshes
from torchlinearmoe.recipe.schema import Recipe


def build_parallel_model(recipe: Recipe, meshes: Meshes, device: torch.device, dtype: torch.dtype) -> Decoder:
    """The model of `recipe`, spread over `meshes`, initialised as one process would."""
    model = lay_out_model(recipe, meshes, dtype)
    model.to_empty(device=device)
    initialize(model, recipe.training.seed)
    return model


def lay_out_model(recipe: Recipe, meshes: Meshes, dtype: torch.dtype) -> Decoder:
    """This rank's part of the model, on the meta device: every layout decision taken, no memory."""
    with torch.device("meta"):
        model = Decoder(recipe.model)
    spread_router_counts(model, meshes)
    if meshes.degrees.expert > 1:
        apply_expert_parallel(model, meshes.ep)
    if recipe.training.compile:
        compile_regions(model, recipe.training.compile_backend)
    apply_fsdp(model, meshes.fsdp, meshes.efsdp, dtype, reshard_after_forward=recipe.parallel.reshard_after_forward)
    return model


def spread_router_counts(model: Decoder, meshes: Meshes) -> None:
    """Tell the routers' balance losses which ranks hold the rest of their tokens."""
    for module in model.modules():
        if isinstance(module, Balance) and module.scope == "global":
            module.layout = TokenLayout(group=meshes.tokens_group)
