"""Who is who among the ranks: the degrees of a run and every mesh over them. No other file builds meshes.

world   pipeline x data_replicate x data_shard x context x tensor      in this order, tensor ranks side by side
fsdp    data_shard x context                                           one copy of the dense weights
ep      the last `expert` ranks of data_shard x context x tensor       one copy of a share of the experts; efsdp is what
                                                                       is left, the copies of that share
data    data_replicate x data_shard                                    ranks with batches of their own
loss    data x context                                                 ranks whose losses add up to a step's
rows    context x tensor                                               ranks with parts of the same packed sequences
tokens  data x context x tensor                                        ranks that route tokens of their own
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchlinearmoe.errors import RecipeError, divisors
from torchlinearmoe.recipe.schema import ParallelRecipe, TrainingRecipe

AXES = ("pipeline", "data_replicate", "data_shard", "context", "tensor")
DENSE_AXES = ("pipeline", "data_replicate", "fsdp", "tensor")
SPARSE_AXES = ("pipeline", "data_replicate", "efsdp", "ep")


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

    @property
    def expert_copies(self) -> int:
        """Ranks that hold the same experts and share their weights."""
        return self.data_shard * self.context * self.tensor // self.expert


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
    lenders = shard * parallel.context * parallel.tensor
    if lenders % parallel.expert:
        raise RecipeError(
            f"parallel.expert = {parallel.expert}: must divide data_shard x context x tensor = {lenders} ranks; "
            f"legal: {divisors(lenders)}"
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
        # And once more for the experts, which borrow all of data_shard, context and tensor.
        sparse = (degrees.pipeline, degrees.data_replicate, degrees.expert_copies, degrees.expert)
        self.sparse: DeviceMesh = init_device_mesh(device_type, sparse, mesh_dim_names=SPARSE_AXES)
        self.data: DeviceMesh = self.world["data_replicate", "data_shard"]._flatten("data")
        loss = self.world["data_replicate", "data_shard", "context"]._flatten("loss")
        self.loss_group: dist.ProcessGroup = loss.get_group()
        """The ranks whose losses and valid tokens add up to those of an optimizer step."""
        self.context_group: dist.ProcessGroup = self.world["context"].get_group()
        """The ranks that share the same packed sequences, a span of each to every rank."""
        rows = self.world["context", "tensor"]._flatten("rows")
        self.rows_group: dist.ProcessGroup = rows.get_group()
        """The ranks that hold parts of the same packed sequences."""
        self.pipeline_group: dist.ProcessGroup = self.world["pipeline"].get_group()
        """The ranks that have the other stages of this rank's pipeline."""
        tokens = self.world["data_replicate", "data_shard", "context", "tensor"]._flatten("tokens")
        self.tokens_group: dist.ProcessGroup = tokens.get_group()
        """The ranks whose routed tokens make up an optimizer step (of one pipeline stage)."""

    @property
    def fsdp(self) -> DeviceMesh:
        """Where dense weights are sharded: [data_replicate, fsdp] with replicas, else [fsdp]."""
        return self.dense["data_replicate", "fsdp"] if self.degrees.data_replicate > 1 else self.dense["fsdp"]

    @property
    def tensor(self) -> DeviceMesh:
        """Where heads, hidden channels and the vocabulary are split, [tensor]."""
        return self.dense["tensor"]

    @property
    def efsdp(self) -> DeviceMesh:
        """Where experts are sharded further: [data_replicate, efsdp] with replicas, else [efsdp].

        The dense mesh where the experts borrow nothing.
        """
        if self.degrees.expert == self.degrees.tensor == 1:
            return self.fsdp
        return self.sparse["data_replicate", "efsdp"] if self.degrees.data_replicate > 1 else self.sparse["efsdp"]

    @property
    def ep(self) -> DeviceMesh:
        """Where whole experts are spread, [ep]."""
        return self.sparse["ep"]

    @property
    def pipeline_rank(self) -> int:
        """Which stages this rank has."""
        return self.world["pipeline"].get_local_rank()

    def some_stages(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        """The group of some ranks of this rank's pipeline, of which this is one; only they call it."""
        every = dist.get_process_group_ranks(self.pipeline_group)
        group = dist.new_group([every[rank] for rank in ranks], use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        return group

    @property
    def data_rank(self) -> int:
        """Which batches this rank takes."""
        return self.data.get_local_rank()
