"""The order in which parallelism is applied; the tour of this folder starts here.

meta model -> tensor parallelism -> expert parallelism -> compile regions -> FSDP -> plain tensors inside forwards
-> allocate this rank's shards -> draw its initial values
"""

from __future__ import annotations

import torch

from torchlinearmoe.initialize import initialize
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.moe.balance import Balance, TokenLayout
from torchlinearmoe.parallel.compile import compile_regions
from torchlinearmoe.parallel.expert import apply_expert_parallel
from torchlinearmoe.parallel.fsdp import apply_fsdp
from torchlinearmoe.parallel.local import shadow_split_parameters
from torchlinearmoe.parallel.mesh import Meshes
from torchlinearmoe.parallel.tensor import apply_tensor_parallel
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
    if meshes.degrees.tensor > 1:
        apply_tensor_parallel(model, meshes.tensor)
    if meshes.degrees.expert > 1:
        apply_expert_parallel(model, meshes.ep)
    if recipe.training.compile:
        compile_regions(model, recipe.training.compile_backend)
    apply_fsdp(model, meshes.fsdp, meshes.efsdp, dtype, reshard_after_forward=recipe.parallel.reshard_after_forward)
    shadow_split_parameters(model)
    return model


def spread_router_counts(model: Decoder, meshes: Meshes) -> None:
    """Tell the routers' balance losses which part of the tokens this rank has, and who has the rest."""
    degrees = meshes.degrees
    groups = {
        "global": meshes.tokens_group,
        "sequence": meshes.rows_group if degrees.context * degrees.tensor > 1 else None,
    }
    for module in model.modules():
        if isinstance(module, Balance):
            module.layout = TokenLayout(
                groups[module.scope], degrees.context, degrees.tensor, meshes.tensor.get_local_rank()
            )
