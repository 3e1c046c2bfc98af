"""Who is who among the ranks: the degrees of a run and every mesh over them. No other file builds meshes.

world   pipeline x data_replicate x data_shard x context x tensor      in this order, tensor ranks side by side
fsdp    data_shard x context                                           one copy of the dense weights
data    data_replicate x data_shard                                    ranks with batches of their own
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.recipe.schema import ParallelRecipe, TrainingRecipe

AXES = ("pipeline", "data_replicate", "data_shard", "context", "tensor")
DENSE_AXES = ("pipeline", "data_replicate", "fsdp", "tensor")


@dataclass(frozen=True)
class Degrees:
    """Sizes of the mesh axes; their product is the world size. `expert` is borrowed, it never multiplies."""

    pipeline: int
    data_replicate: int
    data_shard: int
    context: int
    tensor: int
    expert: int

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.pipeline * self.data_replicate * self.data_shard * self.context * self.tensor

    @property
    def data_ranks(self) -> int:
        """Ranks that take batches of their own."""
        return self.data_replicate * self.data_shard


def resolve_degrees(parallel: ParallelRecipe, world_size: int) -> Degrees:
    """The degrees of `[parallel]` in a world of `world_size` ranks; RecipeError when they do not multiply to it."""
    fixed = parallel.pipeline * parallel.data_replicate * parallel.context * parallel.tensor
    shard = parallel.data_shard
    if shard == -1:
        if world_size % fixed:
            raise RecipeError(
                f"parallel: pipeline x data_replicate x context x tensor = {fixed} does not divide {world_size} ranks"
            )
        shard = world_size // fixed
    if fixed * shard != world_size:
        raise RecipeError(
            f"parallel.data_shard = {shard}: the degrees multiply to {fixed * shard}, not to {world_size} ranks; "
            "set it to -1 to take what is left"
        )
    return Degrees(
        parallel.pipeline, parallel.data_replicate, shard, parallel.context, parallel.tensor, parallel.expert
    )


def tokens_per_step(training: TrainingRecipe, degrees: Degrees) -> int:
    """Tokens of an optimizer step; RecipeError unless it is whole micro-batches on every data rank."""
    unit = training.sequence_length * training.micro_batch_size * degrees.data_ranks
    tokens = training.tokens_per_step or unit
    if tokens % unit:
        raise RecipeError(
            f"training.tokens_per_step = {tokens}: must be a multiple of sequence_length x micro_batch_size x data "
            f"ranks = {training.sequence_length} x {training.micro_batch_size} x {degrees.data_ranks} = {unit}"
        )
    return tokens


class Meshes:
    """All meshes of a run. Needs a process group of `degrees.world_size` ranks."""

    def __init__(self, degrees: Degrees, device_type: str) -> None:
        self.degrees = degrees
        sizes = tuple(getattr(degrees, axis) for axis in AXES)
        self.world: DeviceMesh = init_device_mesh(device_type, sizes, mesh_dim_names=AXES)
        # The same ranks once more, with data_shard and context as one axis: slices of it may keep the replicas.
        dense = (degrees.pipeline, degrees.data_replicate, degrees.data_shard * degrees.context, degrees.tensor)
        self.dense: DeviceMesh = init_device_mesh(device_type, dense, mesh_dim_names=DENSE_AXES)
        self.data: DeviceMesh = self.world["data_replicate", "data_shard"]._flatten("data")

    @property
    def fsdp(self) -> DeviceMesh:
        """Where dense weights are sharded: [data_replicate, fsdp] with replicas, else [fsdp]."""
        return self.dense["data_replicate", "fsdp"] if self.degrees.data_replicate > 1 else self.dense["fsdp"]

    @property
    def data_rank(self) -> int:
        """Which batches this rank takes."""
        return self.data.get_local_rank()

    @property
    def tokens_group(self) -> dist.ProcessGroup:
        """The ranks whose tokens make up an optimizer step (of one pipeline stage)."""
        return self.data.get_group()
