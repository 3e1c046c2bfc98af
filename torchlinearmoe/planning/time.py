"""How long a step takes, estimated from what it computes and sends: enough to tell layouts apart, no more.

    compute    FLOPs of the rank that has most to do, with what runs again in the backward, at one rate for all of them
    bubble     of a pipeline: (P - 1) / M of the compute, for P ranks and M micro-batches; 1 / v of that with v
               interleaved stages a rank, none with a zero-bubble schedule
    sharding   gathers of weights and sums of gradients: beside the compute, so that only what outlasts it counts
    exchange   of tokens, spans, hidden states: while it lasts nothing is computed

Of a sequence cut into spans the last one has most to do, for its softmax layers see all others; where they trade spans
for heads, all have the same. Sequences count as one document each. Not counted: latencies, kernels' launches, the
optimizer's update, uneven routing, data.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from torchlinearmoe.mixers.base import Mixer
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.models.flops import active_parameters, head_flops
from torchlinearmoe.moe.layer import MoE
from torchlinearmoe.parallel.activation_checkpointing import is_checkpointed
from torchlinearmoe.parallel.mesh import Degrees
from torchlinearmoe.planning.communication import Collective
from torchlinearmoe.planning.context import SpanTraffic
from torchlinearmoe.recipe.schema import Recipe, TrainingRecipe

SHARDING = ("fsdp", "efsdp", "data_replicate")
"""Axes whose collectives run beside the compute."""


@dataclass(frozen=True)
class Machine:
    """What GPUs are taken to do. The defaults are of H100 and H200, eight a node."""

    flops: float = 400e12
    """A second and GPU, over a whole step; 989e12 is the peak of bfloat16."""
    node_ranks: int = 8
    node_bytes: float = 300e9
    """A second that a GPU sends to others of its node."""
    network_bytes: float = 40e9
    """A second that a GPU sends to other nodes: 400 Gb/s each."""
    usable: float = 0.9
    """Of a GPU's memory: the rest is for the CUDA context, NCCL's buffers, kernels' workspaces and the allocator."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the rank that takes longest."""

    compute: float
    bubble: float
    sharding: float
    """Whole; the step waits for what outlasts compute and bubble."""
    exchange: float

    @property
    def total(self) -> float:
        """Of all of it."""
        return max(self.compute + self.bubble, self.sharding) + self.exchange


def step_time(
    recipe: Recipe, degrees: Degrees, flops: float, collectives: Sequence[Collective], machine: Machine
) -> StepTime:
    """Of a step of `recipe` on a rank that has `flops` a token (`busiest_flops`) and takes part in `collectives`."""
    parallel, training = recipe.parallel, recipe.training
    assert training.tokens_per_step is not None
    tokens = training.tokens_per_step / (degrees.world_size // degrees.data_replicate // degrees.data_shard)
    tokens /= degrees.data_ranks
    compute = tokens * flops / machine.flops
    passes = training.tokens_per_step // (training.sequence_length * training.micro_batch_size * degrees.data_ranks)
    idle = {"1f1b": 1.0, "interleaved": 1 / parallel.stages_per_rank, "zero_bubble": 0.0}[parallel.pipeline_schedule]
    seconds = {entry: collective_seconds(entry, degrees, machine) for entry in collectives}
    return StepTime(
        compute,
        compute * idle * (degrees.pipeline - 1) / passes,
        sharding=sum(value for entry, value in seconds.items() if entry.axis in SHARDING),
        exchange=sum(value for entry, value in seconds.items() if entry.axis not in SHARDING),
    )


def busiest_flops(model: Decoder, training: TrainingRecipe, context: int, traded: Collection[str] = ()) -> float:
    """FLOPs a token of a step, what runs again included, in the last of `context` spans.

    traded: mixers whose layers trade spans for heads.
    """
    forward, again = head_flops(model.recipe), 0.0
    length = training.sequence_length
    for index, layer in model.layers.items():
        mixer, ffn = layer.mixer, layer.ffn
        assert isinstance(mixer, Mixer) and isinstance(ffn, nn.Module)
        mixing = span_mixing_flops(mixer, length, 1 if mixer.name in traded else context)
        whole = mixer.flops_per_token(length) - mixer.mixing_flops(length) + mixing + 2.0 * active_parameters(ffn)
        forward += whole
        if not is_checkpointed(training, int(index)):
            continue
        # `selective` keeps what matrices and attention gave; recurrences and experts run again.
        small = (0.0 if mixer.keeps_past else mixing) + routed_flops(ffn)
        again += whole if training.activation_checkpointing == "full" else small
    return 3 * forward + again


def trading(spans: Iterable[SpanTraffic]) -> frozenset[str]:
    """Mixers whose layers trade spans for heads."""
    return frozenset(kind.mixer for kind in spans if any("all-to-all" in operation for operation in kind.calls))


def span_mixing_flops(mixer: Mixer, length: int, spans: int) -> float:
    """A token's FLOPs outside the projections in the last of `spans` spans of a document of `length` tokens."""
    before = length - length // spans
    every = mixer.mixing_flops(length) * length
    return (every - (mixer.mixing_flops(before) * before if before else 0.0)) / (length - before)


def routed_flops(ffn: nn.Module) -> float:
    """A token's FLOPs in routed experts."""
    if not isinstance(ffn, MoE):
        return 0.0
    experts = sum(parameter.numel() for parameter in ffn.experts.parameters())
    return 2.0 * experts * ffn.router.top_k / ffn.router.num_experts


def strides(degrees: Degrees) -> dict[str, int]:
    """How far apart neighbours on an axis are in the world."""
    copy = degrees.data_shard * degrees.context * degrees.tensor
    return {
        "tensor": 1,
        "context": degrees.tensor,
        "fsdp": degrees.tensor,
        "ep": 1,
        "efsdp": degrees.expert,
        "data_replicate": copy,
        "pipeline": copy * degrees.data_replicate,
    }


def collective_seconds(entry: Collective, degrees: Degrees, machine: Machine) -> float:
    """Of collectives of one sort.

    A ring that goes through m ranks of each node has the network of all m. In an all-to-all each rank sends by itself:
    the slower of the two ways counts. Stages that are neighbours may lie on two nodes.
    """
    here = max(1, min(entry.ranks, machine.node_ranks // strides(degrees)[entry.axis]))
    if here == entry.ranks:
        return entry.sent_bytes / machine.node_bytes
    if entry.operation.startswith("all-to-all"):
        away = (entry.ranks - here) / (entry.ranks - 1)
        return entry.sent_bytes * max(away / machine.network_bytes, (1 - away) / machine.node_bytes)
    if entry.operation.startswith("send"):
        return entry.sent_bytes / machine.network_bytes
    return entry.sent_bytes / min(machine.node_bytes, here * machine.network_bytes)
