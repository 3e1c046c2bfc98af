"""The order in which parallelism is applied; the tour of this folder starts here.

pipeline stages of this rank, on meta -> layers in float8 -> tensor parallelism -> expert parallelism -> compile
regions -> FSDP -> plain tensors inside forwards -> activation checkpointing -> allocate this rank's shards -> draw
their initial values -> bfloat16 weights beside the masters of what is nowhere sharded -> views of documents that
compiled regions read
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torchlinearmoe.initialize import initialize
from torchlinearmoe.kernels.choose import views_of
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.moe.balance import Balance, TokenLayout
from torchlinearmoe.optim.masters import hold_masters
from torchlinearmoe.parallel.activation_checkpointing import checkpoint_blocks
from torchlinearmoe.parallel.compile import compile_regions
from torchlinearmoe.parallel.expert import apply_expert_parallel
from torchlinearmoe.parallel.float8 import check_sizes, convert_to_float8
from torchlinearmoe.parallel.fsdp import apply_fsdp
from torchlinearmoe.parallel.local import shadow_split_parameters
from torchlinearmoe.parallel.mesh import Meshes
from torchlinearmoe.parallel.passes import Loop, Passes, Pipeline
from torchlinearmoe.parallel.pipeline import stage_layers, stage_ranks
from torchlinearmoe.parallel.shared import SharedParameters
from torchlinearmoe.parallel.stage import Stage
from torchlinearmoe.parallel.tensor import apply_tensor_parallel
from torchlinearmoe.recipe.schema import Recipe


@dataclass(frozen=True)
class ParallelModel:
    """What a rank has of a model, and how micro-batches go through it."""

    parts: Sequence[Decoder]
    """The whole model, or the stages of this rank."""
    passes: Passes
    shared: SharedParameters | None = None
    """Of a pipeline."""


def build_parallel_model(recipe: Recipe, meshes: Meshes, device: torch.device, dtype: torch.dtype) -> ParallelModel:
    """The model of `recipe`, spread over `meshes`, initialised as one process would."""
    parts = lay_out_model(recipe, meshes, dtype, runs=True)
    for part in parts:
        part.to_empty(device=device)
        initialize(part, recipe.training.seed)
        hold_masters(part, dtype)
        if recipe.training.compile:
            part.views = views_of(part, device.type, dtype)
    stages = [part for part in parts if isinstance(part, Stage)]
    if not stages:
        return ParallelModel(parts, Loop(parts[0]))
    shared = SharedParameters(stages, stage_layers(recipe), recipe, meshes)
    return ParallelModel(parts, Pipeline(stages, recipe, meshes, device, dtype), shared)


def lay_out_model(recipe: Recipe, meshes: Meshes, dtype: torch.dtype, *, runs: bool = False) -> list[Decoder]:
    """This rank's part of the model, or its parts, on the meta device: every layout decision taken, no memory.

    runs: with layers of other packages in it that change no size and compute on the machine of the run alone.
    """
    parts = _parts(recipe, meshes)
    for part in parts:
        check_sizes(part, recipe)
        if runs and recipe.training.float8 != "none":
            convert_to_float8(part, recipe.training.float8)
    wide = [part.double() for part in parts] if dtype == torch.float64 else parts
    return [_lay_out(part, recipe, meshes, dtype) for part in wide]


def _parts(recipe: Recipe, meshes: Meshes) -> list[Decoder]:
    """The layers of this rank."""
    with torch.device("meta"):
        if recipe.parallel.pipeline == 1:
            return [Decoder(recipe.model)]
        rank, layers = meshes.pipeline_rank, stage_layers(recipe)
        mine = [stage for stage, owner in enumerate(stage_ranks(recipe.parallel)) if owner == rank]
        return [Stage(recipe, stage, layers[stage]) for stage in mine]


def _lay_out(model: Decoder, recipe: Recipe, meshes: Meshes, dtype: torch.dtype) -> Decoder:
    spread_router_counts(model, meshes)
    if meshes.degrees.tensor > 1:
        apply_tensor_parallel(model, meshes.tensor)
    if meshes.degrees.expert > 1:
        apply_expert_parallel(model, meshes.ep)
    if recipe.training.compile:
        compile_regions(model, recipe.training.compile_backend)
    apply_fsdp(
        model,
        meshes.fsdp,
        meshes.efsdp,
        dtype,
        reshard_after_forward=recipe.parallel.reshard_after_forward,
        reduce_dtype=getattr(torch, recipe.parallel.reduce_dtype),
    )
    shadow_split_parameters(model)
    checkpoint_blocks(model, recipe.training)
    return model


def spread_router_counts(model: Decoder, meshes: Meshes) -> None:
    """Tell the routers which tokens this rank has and who has the rest, for balance losses and capacities."""
    degrees = meshes.degrees
    groups = {
        "global": meshes.tokens_group,
        "sequence": meshes.rows_group if degrees.context * degrees.tensor > 1 else None,
    }
    for module in model.modules():
        if isinstance(module, Balance):
            module.layout = TokenLayout(
                groups[module.scope],
                degrees.context,
                degrees.tensor,
                meshes.tensor.get_local_rank(),
                groups["sequence"],
            )
