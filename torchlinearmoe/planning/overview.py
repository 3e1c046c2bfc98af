"""A plan: everything a recipe costs on a world of ranks, as plain data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.models.flops import forward_flops_per_token, training_flops_per_token
from torchlinearmoe.parallel.mesh import Degrees, Meshes, resolve_degrees, tokens_per_step
from torchlinearmoe.parallel.pipeline import check_micro_batches, micro_batches, stage_layers
from torchlinearmoe.planning.communication import counting_forwards
from torchlinearmoe.planning.layers import count_parameters, forward_flop_terms
from torchlinearmoe.planning.memory import Memory, checkpoint_bytes, optimizer_states
from torchlinearmoe.planning.rank import RankPlan, price, rank_parts
from torchlinearmoe.planning.world import pretended_world
from torchlinearmoe.recipe import Recipe
from torchlinearmoe.run_folder import with_tokens_per_step


def plan(
    recipe: Recipe,
    world_size: int,
    dtype: torch.dtype,
    rank: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """What `recipe` costs on `world_size` ranks, computing in `dtype`; sizes in bytes, JSON types only.

    `memory.rank` is `rank`'s; `memory.largest` that of the rank that holds most. Needs a process without a process
    group. Raises RecipeError, as training would, for a layout that cannot be. `progress` is called with (ranks laid
    out, ranks to lay out): this one and the first of each stage stand for all.
    """
    degrees = resolve_degrees(recipe.parallel, world_size)
    recipe = with_tokens_per_step(recipe, tokens_per_step(recipe.training, degrees))
    check_micro_batches(recipe, degrees)
    training = recipe.training
    assert training.tokens_per_step is not None
    accumulation = micro_batches(recipe, degrees)
    steps = training.steps or math.ceil((training.tokens or 0) / training.tokens_per_step)
    length = training.sequence_length
    with torch.device("meta"):
        whole = Decoder(recipe.model)
    flops = {
        "document_length": length,
        "forward_per_token": forward_flops_per_token(whole, length),
        "training_per_token": training_flops_per_token(whole, length),
        "forward_terms": [dataclasses.asdict(term) for term in forward_flop_terms(whole, length)],
    }
    firsts = [first for first in range(0, world_size, world_size // degrees.pipeline) if first != rank]
    tell = progress or (lambda done, total: None)
    tell(0, 1 + len(firsts))
    own = _rank_plan(recipe, degrees, dtype, rank, counting_forwards(whole, accumulation))
    # Torch gives the lower ranks of an axis the larger pieces, so the first rank of a stage holds as much as any of it.
    largest_rank, largest = rank, own.memory
    for done, first in enumerate(firsts, start=1):
        tell(done, 1 + len(firsts))
        other = _rank_plan(recipe, degrees, dtype, first, 0).memory
        if other.total > largest.total or (degrees.pipeline == 1 and other.total == largest.total):
            largest_rank, largest = first, other
    tell(1 + len(firsts), 1 + len(firsts))
    collectives = own.collectives
    return {
        "world_size": world_size,
        "dtype": str(dtype).removeprefix("torch."),
        "mesh": dataclasses.asdict(degrees),
        "parameters": dataclasses.asdict(count_parameters(whole)),
        "flops": flops,
        "step": {
            "tokens": training.tokens_per_step,
            "sequence_length": length,
            "micro_batch_size": training.micro_batch_size,
            "accumulation": accumulation,
            "stages": [[layers.start, layers.stop] for layers in stage_layers(recipe)] if degrees.pipeline > 1 else [],
            "flops_per_rank": flops["training_per_token"] * training.tokens_per_step / world_size,
        },
        "run": {"steps": steps, "tokens": steps * training.tokens_per_step},
        "memory": {
            "rank": {"rank": rank, **_as_dict(own.memory)},
            "largest": {"rank": largest_rank, **_as_dict(largest)},
        },
        "communication": {
            "collectives": [dataclasses.asdict(collective) for collective in collectives],
            "sent_bytes": sum(collective.sent_bytes for collective in collectives),
            "units": own.units,
            "padding_factor": own.padding_factor,
            "spans": [dataclasses.asdict(kind) for kind in own.spans],
        },
        "checkpoint_bytes": checkpoint_bytes(whole, optimizer_states(whole, recipe.optimizer)),
    }


def _rank_plan(recipe: Recipe, degrees: Degrees, dtype: torch.dtype, rank: int, counting: int) -> RankPlan:
    """What `rank` holds and sends in a step, after `counting` forwards by themselves."""
    with pretended_world(degrees.world_size, rank):
        meshes = Meshes(degrees, "cpu")
        return price(rank_parts(recipe, meshes, dtype), recipe, meshes, dtype, counting)


def _as_dict(memory: Memory) -> dict[str, int]:
    return {**dataclasses.asdict(memory), "total": memory.total}
