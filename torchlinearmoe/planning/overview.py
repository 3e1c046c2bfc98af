"""A plan: everything a recipe costs on a world of ranks, as plain data."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.models.flops import forward_flops_per_token, training_flops_per_token
from torchlinearmoe.parallel.apply import lay_out_model
from torchlinearmoe.parallel.mesh import Meshes, resolve_degrees, tokens_per_step
from torchlinearmoe.parallel.pipeline import check_micro_batches
from torchlinearmoe.planning.communication import fsdp_units, step_collectives
from torchlinearmoe.planning.context import span_traffic
from torchlinearmoe.planning.layers import count_parameters, forward_flop_terms
from torchlinearmoe.planning.memory import Memory, checkpoint_bytes, optimizer_states, rank_memory
from torchlinearmoe.planning.world import pretended_world
from torchlinearmoe.recipe import Recipe
from torchlinearmoe.run_folder import with_tokens_per_step


def plan(recipe: Recipe, world_size: int, dtype: torch.dtype, rank: int = 0) -> dict[str, Any]:
    """What `recipe` costs on `world_size` ranks, computing in `dtype`; sizes in bytes, JSON types only.

    `memory.rank` is `rank`'s; `memory.largest` that of the rank that holds most. Needs a process without a process
    group. Raises RecipeError, as training would, for a layout that cannot be.
    """
    degrees = resolve_degrees(recipe.parallel, world_size)
    recipe = with_tokens_per_step(recipe, tokens_per_step(recipe.training, degrees))
    check_micro_batches(recipe, degrees)
    if degrees.pipeline > 1:
        raise RecipeError(f"parallel.pipeline = {degrees.pipeline}: a pipeline cannot be planned yet, only trained")
    training = recipe.training
    assert training.tokens_per_step is not None
    micro_batch = training.sequence_length * training.micro_batch_size
    accumulation = training.tokens_per_step // (micro_batch * degrees.data_ranks)
    steps = training.steps or math.ceil((training.tokens or 0) / training.tokens_per_step)
    with pretended_world(world_size, rank):
        meshes = Meshes(degrees, "cpu")
        (model,) = lay_out_model(recipe, meshes, dtype)
        parameters = count_parameters(model)
        length = training.sequence_length
        flops = {
            "document_length": length,
            "forward_per_token": forward_flops_per_token(model, length),
            "training_per_token": training_flops_per_token(model, length),
            "forward_terms": [dataclasses.asdict(term) for term in forward_flop_terms(model, length)],
        }
        spans = span_traffic(recipe, meshes, dtype)
        tokens = micro_batch // degrees.context
        collectives = step_collectives(
            model, accumulation, tokens, dtype, training, degrees.tensor, degrees.context, spans
        )
        states = optimizer_states(model, recipe.optimizer)
        own = rank_memory(model, states, training, degrees, dtype)
        checkpoint = checkpoint_bytes(model, states)
        units = fsdp_units(model)
    padding = sum(u.local_elements * u.shard_ranks for u in units) / sum(u.elements for u in units)
    largest_rank, largest = rank, own
    # Torch gives the lower ranks of an axis the larger pieces, so rank 0 holds at least as much as any other.
    if rank != 0:
        with pretended_world(world_size, 0):
            (first,) = lay_out_model(recipe, Meshes(degrees, "cpu"), dtype)
            largest_rank = 0
            largest = rank_memory(first, optimizer_states(first, recipe.optimizer), training, degrees, dtype)
    return {
        "world_size": world_size,
        "dtype": str(dtype).removeprefix("torch."),
        "mesh": dataclasses.asdict(degrees),
        "parameters": dataclasses.asdict(parameters),
        "flops": flops,
        "step": {
            "tokens": training.tokens_per_step,
            "sequence_length": length,
            "micro_batch_size": training.micro_batch_size,
            "accumulation": accumulation,
            "flops_per_rank": flops["training_per_token"] * training.tokens_per_step / world_size,
        },
        "run": {"steps": steps, "tokens": steps * training.tokens_per_step},
        "memory": {
            "rank": {"rank": rank, **_as_dict(own)},
            "largest": {"rank": largest_rank, **_as_dict(largest)},
        },
        "communication": {
            "collectives": [dataclasses.asdict(collective) for collective in collectives],
            "sent_bytes": sum(collective.sent_bytes for collective in collectives),
            "units": len(units),
            "padding_factor": padding,
            "spans": [dataclasses.asdict(kind) for kind in spans],
        },
        "checkpoint_bytes": checkpoint,
    }


def _as_dict(memory: Memory) -> dict[str, int]:
    return {**dataclasses.asdict(memory), "total": memory.total}
