"""What a pipeline makes of a step: in which order a rank runs its stages, what is held meanwhile, what stages send.

The order is that of the schedule itself, made for stages without memory. Torch keeps a stage's weights gathered after
every backward but the last, so how often they are gathered depends on the order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.distributed.pipelining.schedules import _Action, _ComputationType
from torch.distributed.tensor import DTensor

from torchlinearmoe.parallel.mesh import Meshes
from torchlinearmoe.parallel.passes import Pipeline
from torchlinearmoe.parallel.pipeline import passed_between, shared_between, stage_layers, stage_ranks
from torchlinearmoe.parallel.stage import Stage
from torchlinearmoe.planning.communication import Collectives
from torchlinearmoe.recipe.schema import Recipe

FORWARD = _ComputationType.FORWARD
BACKWARDS = (_ComputationType.FULL_BACKWARD, _ComputationType.BACKWARD_INPUT)
ENDS = (_ComputationType.FULL_BACKWARD, _ComputationType.BACKWARD_WEIGHT)


def rank_order(stages: Sequence[Stage], recipe: Recipe, meshes: Meshes, dtype: torch.dtype) -> list[_Action]:
    """The forwards and backwards of this rank's stages in a step, one after the other."""
    schedule: Any = Pipeline(list(stages), recipe, meshes, torch.device("meta"), dtype).schedule
    orders = getattr(schedule, "pipeline_order", None) or schedule._get_pipeline_order()
    assert orders is not None
    return [action for action in orders[meshes.pipeline_rank] if action is not None]


def gathers(order: Sequence[_Action], stage: int, kept: bool, counting: int) -> tuple[int, int]:
    """How often a unit of `stage` is gathered for forwards and for backwards, after `counting` forwards by themselves.

    kept: it stays gathered after a forward.
    """
    forwards, backwards, there = (1 if kept and counting else counting), 0, kept and counting > 0
    for action in order:
        if action.stage_index == stage and action.computation_type is FORWARD:
            forwards, there = forwards + (not there), kept
        elif action.stage_index == stage and action.computation_type in BACKWARDS:
            backwards, there = backwards + (not there), True
    return forwards, backwards


def most_in_flight(order: Sequence[_Action], held: dict[int, int]) -> int:
    """The most bytes of activations at a time, if a micro-batch keeps `held` of them in a stage."""
    changes = [
        held[action.stage_index] * ((action.computation_type is FORWARD) - (action.computation_type in ENDS))
        for action in order
    ]
    return max(accumulate(changes), default=0)


def add_pipeline_transfers(
    stages: Sequence[Stage], recipe: Recipe, dtype: torch.dtype, forwards: int, backwards: int, found: Collectives
) -> None:
    """Add what this rank's stages send to those of other ranks in `forwards` and `backwards` micro-batches, and the
    gradients of modules that stages have copies of."""
    parallel, layers, ranks = recipe.parallel, stage_layers(recipe), stage_ranks(recipe.parallel)

    def add(direction: str, times: int, border: int) -> None:
        tensors = passed_between(recipe, border, dtype)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        found.add("pipeline", parallel.pipeline, f"send, {direction}", times, size, len(tensors))

    for stage in stages:
        mine = ranks[stage.index]
        if not stage.holds_last and ranks[stage.index + 1] != mine:
            add("forward", forwards, stage.span.stop)
        if not stage.holds_first and ranks[stage.index - 1] != mine:
            add("backward", backwards, stage.span.start)
    for path, holders in shared_between(recipe.model, layers).items():
        owners = {ranks[stage] for stage in holders}
        own = next((stage for stage in stages if stage.index in holders), None)
        if own is None or len(owners) == 1:
            continue
        for (numel, width), count in Counter(_local_sizes(own.get_submodule(path))).items():
            found.add("pipeline", len(owners), "all-reduce, shared gradients", count, numel * width)


def _local_sizes(module: torch.nn.Module) -> list[tuple[int, int]]:
    """Elements and element size, at least float32's, of the gradient of this rank's part of every parameter."""
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
    return [(part.numel(), torch.promote_types(part.dtype, torch.float32).itemsize) for part in parts]
