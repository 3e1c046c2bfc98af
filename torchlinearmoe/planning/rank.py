"""What one rank holds and sends in a step: its part of the model, laid out once, priced as often as one likes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.optim.masters import hold_masters
from torchlinearmoe.parallel.apply import lay_out_model
from torchlinearmoe.parallel.mesh import Meshes
from torchlinearmoe.parallel.pipeline import micro_batches
from torchlinearmoe.parallel.stage import Stage
from torchlinearmoe.planning.communication import Collective, Collectives, PassSizes, Unit, add_step, fsdp_units
from torchlinearmoe.planning.context import LayerTraffic, SpanTraffic, span_traffic, traffic_by_layer
from torchlinearmoe.planning.memory import Held, Memory, held_by, optimizer_states, rank_memory
from torchlinearmoe.planning.pipeline import add_pipeline_transfers, gathers, most_in_flight, rank_order
from torchlinearmoe.recipe import Recipe


@dataclass(frozen=True)
class RankPlan:
    """Of one rank and step."""

    memory: Memory
    collectives: list[Collective]
    spans: list[SpanTraffic]
    units: int
    padding_factor: float


@dataclass(frozen=True)
class Part:
    """The model of a rank, or one of its stages, with what does not depend on how long sequences are."""

    model: Decoder
    units: list[Unit]
    held: Held


def rank_parts(recipe: Recipe, meshes: Meshes, dtype: torch.dtype) -> list[Part]:
    """This rank's part of the model, on the meta device. Needs a (pretended) process group.

    It is the same for all lengths, micro-batches, kinds of activation checkpointing, and ways to share out
    `data_shard` x `context` ranks between the two.
    """
    parts = []
    for model in lay_out_model(recipe, meshes, dtype):
        hold_masters(model, dtype)
        parts.append(Part(model, fsdp_units(model), held_by(model, optimizer_states(model, recipe.optimizer))))
    return parts


def price(
    parts: Sequence[Part],
    recipe: Recipe,
    meshes: Meshes,
    dtype: torch.dtype,
    counting: int,
    traffic: LayerTraffic | None = None,
) -> RankPlan:
    """What `recipe` costs the rank that has `parts`, with `counting` forwards by themselves.

    traffic: that of `traffic_by_layer`, where it is known.
    """
    training, degrees = recipe.training, meshes.degrees
    accumulation = micro_batches(recipe, degrees)
    tokens = training.sequence_length * training.micro_batch_size // degrees.context
    traffic = traffic_by_layer(recipe, meshes, dtype) if traffic is None else traffic
    found = Collectives()
    memories: list[Memory] = []
    held: dict[int, int] = {}
    stages = [part.model for part in parts if isinstance(part.model, Stage)]
    order = rank_order(stages, recipe, meshes, dtype) if stages else []
    passes = PassSizes(accumulation, tokens, dtype, training, degrees.tensor, degrees.context)
    for part in parts:
        stage = part.model.index if isinstance(part.model, Stage) else None
        spans = span_traffic(traffic, training, set(part.model.layers))
        gathered = None if stage is None else partial(gathers, order, stage, counting=counting)
        add_step(part.model, part.units, replace(passes, spans=spans, gathers=gathered), counting, found)
        memories.append(rank_memory(part.model, part.units, part.held, training, degrees, dtype))
        if stage is not None:
            held[stage] = memories[-1].activations
    if stages:
        add_pipeline_transfers(stages, recipe, dtype, accumulation + counting, accumulation, found)
    memory = memories[0]
    for other in memories[1:]:
        memory += other
    if stages:
        memory = replace(memory, activations=most_in_flight(order, held))
    units = [unit for part in parts for unit in part.units]
    elements = sum(unit.elements for unit in units)
    padding = sum(unit.local_elements * unit.shard_ranks for unit in units) / elements if elements else 1.0
    layers = {index for part in parts for index in part.model.layers}
    return RankPlan(memory, found.listed(), span_traffic(traffic, training, layers), len(units), padding)
