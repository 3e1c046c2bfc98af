"""What a rank sends in an optimizer step, read off the model as it was spread.

Fully sharded data parallelism. A unit is gathered as a whole. Per micro-batch: gathered for the forward, freed,
gathered again for the backward; a unit that keeps its weights in between is gathered once. After the last micro-batch
each unit's gradient is reduce-scattered over the shards, then all-reduced over the replicas.

Torch pads each parameter so that every rank sends the same number of elements; the sizes here are the padded ones.

Expert parallelism. A layer exchanges a row for each token and choice, there and back, in the forward and again in the
backward. How many go to which rank the routers decide; the buffers here are those of an even load, which is what they
are summed over the ranks. Assignments over a capacity stay at home, but are counted.

Tensor parallelism: see `tensor.py`. Context parallelism: see `context.py`.

Activation checkpointing. What lies inside a checkpointed layer runs its forward again, but for sums over
tensor-parallel ranks that `selective` keeps. FSDP gathers nothing more: the layer's weights are there for its backward.

Not counted: scalars (loss, token counts, gradient norm) and the counts of the routers, some kilobytes a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.moe.balance import needs_counting_pass
from torchlinearmoe.moe.layer import MoE
from torchlinearmoe.parallel.activation_checkpointing import is_checkpointed
from torchlinearmoe.parallel.expert import ExchangeDispatch
from torchlinearmoe.planning.context import SpanTraffic
from torchlinearmoe.planning.tensor import add_tensor_collectives
from torchlinearmoe.recipe.schema import TrainingRecipe


@dataclass(frozen=True)
class Unit:
    """Weights that are gathered together."""

    name: str
    """Path of its first module; "" for the root."""
    shard_axis: str
    shard_ranks: int
    replica_axis: str
    replica_ranks: int
    local_elements: int
    """Elements a rank holds, padding included."""
    elements: int
    """Elements of the whole weights, without padding."""
    compute_dtype: torch.dtype
    reduce_dtype: torch.dtype
    kept: bool
    """Stays gathered from forward to backward."""

    @property
    def gathered_bytes(self) -> int:
        """The buffer of an all-gather: the whole padded weights in the compute type."""
        return self.local_elements * self.shard_ranks * self.compute_dtype.itemsize

    @property
    def scattered_bytes(self) -> int:
        """The buffer that a reduce-scatter takes: the whole padded gradient in the reduce type."""
        return self.local_elements * self.shard_ranks * self.reduce_dtype.itemsize

    @property
    def shard_bytes(self) -> int:
        """A rank's share of the gradient in the reduce type, which the replicas all-reduce."""
        return self.local_elements * self.reduce_dtype.itemsize


@dataclass(frozen=True)
class Collective:
    """All collectives of one sort in a step, as one rank sees them."""

    axis: str
    ranks: int
    operation: str
    count: int
    bytes: int
    """Summed size of the whole buffers: an all-gather's output, a reduce-scatter's input, what is all-reduced or
    exchanged."""
    sent_bytes: int
    """What this rank sends in ring algorithms: (n - 1) / n of the buffers, twice that for an all-reduce."""


def fsdp_units(model: nn.Module) -> list[Unit]:
    """The units of a model that FSDP has sharded, in the order of its modules."""
    names = {id(module): name for name, module in model.named_modules()}
    seen: set[int] = set()
    units = []
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        for group in _parameter_groups(module):
            if id(group) not in seen:
                seen.add(id(group))
                units.append(_unit(group, names[id(group.modules[0])]))
    return units


def _parameter_groups(module: FSDPModule) -> list:
    """FSDP's own record of the module's units; torch 2.12 made a list of the single one."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def _unit(group, name: str) -> Unit:
    info, policy = group.mesh_info, group.mp_policy
    axes = info.mesh.mesh_dim_names
    replica_dim = getattr(info, "replicate_mesh_dim", None)
    original = group.fsdp_params[0].sharded_param.dtype
    compute = policy.param_dtype or original
    return Unit(
        name=name,
        shard_axis=axes[info.shard_mesh_dim],
        shard_ranks=info.mesh.size(info.shard_mesh_dim),
        replica_axis="" if replica_dim is None else axes[replica_dim],
        replica_ranks=1 if replica_dim is None else info.mesh.size(replica_dim),
        local_elements=sum(math.prod(p.padded_sharded_param_size) for p in group.fsdp_params),
        elements=sum(math.prod(p._orig_size) for p in group.fsdp_params),
        compute_dtype=compute,
        reduce_dtype=policy.reduce_dtype or compute,
        kept=not group._reshard_after_forward,
    )


@dataclass(frozen=True)
class PassSizes:
    """How a step's micro-batches go through the model, or a pipeline stage, of a rank."""

    micro_batches: int
    tokens: int
    """Of a micro-batch, on all tensor-parallel ranks together."""
    dtype: torch.dtype
    """Of the hidden states."""
    training: TrainingRecipe
    tensor_ranks: int = 1
    context_ranks: int = 1
    spans: Sequence[SpanTraffic] = ()
    """What `span_traffic` counts for the layers at hand."""
    gathers: Callable[[bool], tuple[int, int]] | None = None
    """Of a stage: how often a unit is gathered for forwards and backwards, given whether it is kept between them."""


class Collectives:
    """Adds up the collectives of a rank by axis, ranks and operation."""

    def __init__(self) -> None:
        self._totals: dict[tuple[str, int, str], list[int]] = {}

    def add(self, axis: str, ranks: int, operation: str, count: int, size: int, calls: int = 1) -> None:
        """`count` times `calls` collectives, the calls of `size` bytes together."""
        if ranks > 1 and count:
            entry = self._totals.setdefault((axis, ranks, operation), [0, 0])
            entry[0] += count * calls
            entry[1] += count * size

    def listed(self) -> list[Collective]:
        """All of them."""
        return [
            Collective(axis, ranks, operation, count, size, _ring(operation, ranks, size))
            for (axis, ranks, operation), (count, size) in self._totals.items()
        ]


def counting_forwards(model: Decoder, micro_batches: int) -> int:
    """Forwards by themselves: a global balance loss needs the whole step's counts first."""
    return micro_batches if micro_batches > 1 and needs_counting_pass(model) else 0


def add_step(model: Decoder, units: Sequence[Unit], passes: PassSizes, counting: int, found: Collectives) -> None:
    """Add what a rank takes part in during one optimizer step of `model`, the whole or a stage of it."""
    accumulation, training, add = passes.micro_batches, passes.training, found.add
    for unit in units:
        if passes.gathers is not None:
            forwards, backwards = passes.gathers(unit.kept)
        else:
            # A kept unit is still gathered when the first micro-batch comes after the counting.
            forwards = accumulation if unit.kept else accumulation + counting
            backwards = 0 if unit.kept else accumulation
        shard = unit.shard_axis, unit.shard_ranks
        add(*shard, "all-gather, forward", forwards, unit.gathered_bytes)
        add(*shard, "all-gather, backward", backwards, unit.gathered_bytes)
        add(*shard, "reduce-scatter, gradients", 1, unit.scattered_bytes)
        add(unit.replica_axis, unit.replica_ranks, "all-reduce, gradients", 1, unit.shard_bytes)
    last = units[-1].name if units and all(unit.name for unit in units) else ""
    if counting and (last == "norm" or (last and passes.gathers is None)):
        # FSDP still knows the order of the counting forwards: at the end of the first backward it fetches, in vain, the
        # unit that came last in them. The root, where it has weights of its own, is that unit and is still there, as
        # are a pipeline stage's layers.
        add(units[-1].shard_axis, units[-1].shard_ranks, "all-gather, backward", 1, units[-1].gathered_bytes)
    for index, layer in model.layers.items():
        moe = layer.ffn
        if isinstance(moe, MoE) and isinstance(moe.dispatcher, ExchangeDispatch):
            rows = passes.tokens // passes.tensor_ranks * moe.router.top_k
            size = rows * moe.experts.down.shape[2] * passes.dtype.itemsize
            ranks = moe.dispatcher.group.size()
            again = accumulation * is_checkpointed(training, int(index))
            add("ep", ranks, "all-to-all, forward", 2 * (accumulation + counting + again), size)
            add("ep", ranks, "all-to-all, backward", 2 * accumulation, size)
    if passes.tensor_ranks > 1:
        add_tensor_collectives(
            model,
            training,
            passes.tensor_ranks,
            passes.tokens,
            passes.dtype,
            accumulation + counting,
            accumulation,
            add,
        )
    for kind in passes.spans:
        for operation, calls in kind.calls.items():
            times = kind.layers * accumulation
            if operation.endswith("forward"):
                times += kind.layers * counting + kind.again * accumulation
            add("context", passes.context_ranks, operation, times, kind.bytes[operation], calls)


def _ring(operation: str, ranks: int, size: int) -> int:
    if operation.startswith("send"):
        return size
    return (2 if operation.startswith("all-reduce") else 1) * size * (ranks - 1) // ranks
