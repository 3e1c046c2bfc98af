"""Bytes a rank holds at the worst moment of a step, where the last backward begins.

Asked of the sharded model: parameters, gradients, optimizer states, gathered weights. Estimated: activations and the
loss, see `activation_bytes` and `loss_bytes`. Not counted: the CUDA context, NCCL's buffers, kernels' workspaces and
what the allocator loses.

Letters: T tokens of a micro-batch on this rank, D width, V vocabulary, F hidden width, k experts a token, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from torchlinearmoe.checkpoint.state import model_tensors
from torchlinearmoe.kernels import dispatch, grouped_mm, swiglu
from torchlinearmoe.kernels import experts as all_in_one
from torchlinearmoe.kernels.cross_entropy.chunked import CHUNK_ELEMENTS
from torchlinearmoe.layers.mlp import FeedForward, NoFeedForward
from torchlinearmoe.mixers.base import Mixer
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.moe.grouped_linear import GroupedLinear
from torchlinearmoe.moe.layer import MoE
from torchlinearmoe.optim.build import build_optimizer
from torchlinearmoe.optim.masters import is_sharded, local_part, rest_of
from torchlinearmoe.optim.sums import held_bytes
from torchlinearmoe.parallel.activation_checkpointing import is_checkpointed
from torchlinearmoe.parallel.mesh import Degrees
from torchlinearmoe.parallel.stage import Stage
from torchlinearmoe.parallel.tensor import partial_gradients
from torchlinearmoe.planning.communication import Unit
from torchlinearmoe.recipe.schema import OptimizerRecipe, TrainingRecipe


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    parameters: int
    """This rank's shards of the float32 master weights; whole masters, as halves, of what is not sharded."""
    padding: int
    """What torch adds to the shards so that all ranks hold the same; 0 where everything divides."""
    gradients: int
    """Float32 shards; of the whole weights while micro-batches accumulate, since only the last one is reduced. Of
    weights that are not sharded, in their own type; while micro-batches accumulate in float32, of large ones the last
    micro-batch's beside it."""
    optimizer: int
    """All tensors of the optimizer's state."""
    gathered_weights: int
    """In the compute type: units that stay gathered, and two blocks, the one at work and the next; all of a stage."""
    gradient_buffers: int
    """Of the largest block: its gradient in the compute type, and the float32 copy that is reduce-scattered."""
    activations: int
    loss: int

    @property
    def total(self) -> int:
        """Sum of all of it."""
        return sum(vars(self).values())

    def __add__(self, other: Memory) -> Memory:
        """Of two stages of one rank."""
        return Memory(**{name: size + getattr(other, name) for name, size in vars(self).items()})


@dataclass(frozen=True)
class Held:
    """Bytes of a rank's part of a model that do not depend on how much goes through it."""

    parameters: int
    shards: int
    """Of the parameters, those that FSDP shards, padding left out."""
    optimizer: int
    unsharded_gradients: tuple[int, int, int]
    """Of a step of one micro-batch, of two, and of more."""


def held_by(model: Decoder, states: Iterable[Tensor]) -> Held:
    """What `model`, laid out on the meta device, holds; `states` are those of the optimizer (`optimizer_states`)."""
    in_parts = not isinstance(model, Stage)
    once, twice, often = (unsharded_gradient_bytes(model, passes, in_parts) for passes in (1, 2, 3))
    return Held(
        parameters=parameter_bytes(model),
        shards=local_bytes(parameter for parameter in model.parameters() if is_sharded(parameter)),
        optimizer=local_bytes(states),
        unsharded_gradients=(once, twice, often),
    )


def rank_memory(
    model: Decoder, units: list[Unit], held: Held, training: TrainingRecipe, degrees: Degrees, dtype: torch.dtype
) -> Memory:
    """The memory of the rank that `model`, laid out on the meta device, belongs to.

    `units` are its `fsdp_units`; `training.tokens_per_step` is resolved.
    """
    staged = degrees.pipeline > 1  # keeps its weights gathered between micro-batches
    tokens = training.sequence_length * training.micro_batch_size // degrees.context
    assert training.tokens_per_step is not None
    passes = training.tokens_per_step // (training.sequence_length * training.micro_batch_size * degrees.data_ranks)
    accumulates = passes > 1
    padded = sum(unit.local_elements for unit in units) * torch.float32.itemsize
    whole = sum(unit.elements * unit.reduce_dtype.itemsize for unit in units)
    blocks = _blocks(units)
    sizes = sorted((sum(unit.gathered_bytes for unit in block) for block in blocks), reverse=True)
    buffers = (sum(unit.gathered_bytes + unit.scattered_bytes for unit in block) for block in _blocks(units, kept=True))
    return Memory(
        parameters=held.parameters,
        padding=padded - held.shards,
        gradients=(whole if accumulates else padded) + held.unsharded_gradients[min(passes, 3) - 1],
        optimizer=held.optimizer,
        gathered_weights=sum(unit.gathered_bytes for unit in units if unit.kept) + sum(sizes[: None if staged else 2]),
        gradient_buffers=max(buffers, default=0),
        activations=activation_bytes(model, training, tokens, dtype, degrees.tensor),
        loss=loss_bytes(model, tokens, dtype, degrees.tensor) if model.holds_last else 0,
    )


def local_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of this rank's parts of `tensors`, padding left out."""
    locals_ = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in locals_)


def parameter_bytes(model: nn.Module) -> int:
    """This rank's parts of all masters, halves and wholes."""
    rests = [rest for parameter in model.parameters() if (rest := rest_of(parameter)) is not None]
    return local_bytes(model.parameters()) + local_bytes(rests)


def unsharded_gradient_bytes(model: nn.Module, micro_batches: int, in_parts: bool) -> int:
    """Gradients of what FSDP does not shard, when the last backward of a step is over; see `optim.sums.held_bytes`.

    What tensor-parallel ranks have parts of is summed over them in float32.
    """
    summed = {id(parameter) for parameter in partial_gradients(model)}
    total = 0
    for parameter in model.parameters():
        if is_sharded(parameter):
            continue
        if rest_of(parameter) is not None and id(parameter) not in summed:
            total += held_bytes(parameter, micro_batches, in_parts)
        else:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            total += local_part(parameter.detach()).numel() * wide.itemsize
    return total


def optimizer_states(model: nn.Module, recipe: OptimizerRecipe) -> list[Tensor]:
    """All tensors that the recipe's optimizer will hold for a meta model: it is built and asked.

    Parameters that are laid out alike have alike states, so one of them is asked for all.
    """
    optimizer = build_optimizer(model, name=recipe.name, lr=recipe.lr, states=recipe.states)
    examples: dict[object, list[Tensor]] = {}
    found: list[Tensor] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            layout = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else ()
            kind = (parameter.shape, parameter.dtype, layout)
            if kind not in examples:
                examples[kind] = list(optimizer.init_state(parameter).values())
            found += examples[kind]
    return found


def checkpoint_bytes(model: nn.Module, states: Iterable[Tensor]) -> int:
    """The tensors of a checkpoint, of all ranks together: weights, buffers that are saved, optimizer states."""
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model_tensors(model).values(), *states])


def _blocks(units: list[Unit], kept: bool = False) -> list[list[Unit]]:
    """The units that are gathered at the same time: all of one layer, or one by itself; with `kept` those too."""
    blocks: dict[str, list[Unit]] = {}
    for unit in units:
        if kept or not unit.kept:
            parts = unit.name.split(".")
            blocks.setdefault(".".join(parts[:2]) if parts[0] == "layers" else unit.name, []).append(unit)
    return list(blocks.values())


def activation_bytes(
    model: Decoder, training: TrainingRecipe, tokens: int, dtype: torch.dtype, tensor_ranks: int = 1
) -> int:
    """An estimate of what the forward of `tokens` tokens keeps for the backward, over all layers.

    A layer counts, per token: its input and the stream after the mixer (2 D) and both norms' outputs (2 D); the output
    of every projection of the mixer and the input of its output projections; a dense feed-forward's 4 F (both products,
    silu and what goes into the last one; of one without gates 2 F), or what router and experts keep (`router_bytes`,
    `experts_bytes`). Then the embedding's output and the last norm's. Attention is taken not to keep its scores,
    recurrences not to keep their states between tokens, and no compiler to recompute; what a mixer keeps beyond its
    projections (gates, feature maps) is not counted.

    A checkpointed layer keeps its input, under `selective` also what its dense matrices give; the largest of them is
    there as a whole while its backward runs.

    Tensor-parallel ranks share all of it, but what is gathered, D before each mixer, dense feed-forward and the head,
    each keeps whole.
    """
    width = model.recipe.hidden_size * dtype.itemsize
    split, gathered, running = (model.holds_first + model.holds_last) * width, int(model.holds_last), (0, 0)
    for index, layer in model.layers.items():
        mixer, ffn = layer.mixer, layer.ffn
        assert isinstance(mixer, Mixer) and isinstance(ffn, nn.Module)
        projections = mixer_elements(mixer, model.recipe.hidden_size) * dtype.itemsize
        whole = (2 if isinstance(ffn, NoFeedForward) else 4) * width + projections + feed_forward_bytes(ffn, dtype)
        gathers = 1 + sum(isinstance(module, FeedForward) for module in ffn.modules())
        if not is_checkpointed(training, int(index)):
            split, gathered = split + whole, gathered + gathers
            continue
        running = max(running, (whole, gathers))
        split += width
        if training.activation_checkpointing == "selective":
            split += projections + dense_bytes(ffn, dtype)
    split, gathered = split + running[0], gathered + running[1]
    if tensor_ranks == 1:
        return tokens * split
    return tokens * (split // tensor_ranks + gathered * width)


def dense_bytes(ffn: nn.Module, dtype: torch.dtype) -> int:
    """Bytes a token leaves at the outputs of a feed-forward's dense matrices: 2 F + D, F + D without gates, L + D of
    latent channels, and E float32 of a router."""
    if isinstance(ffn, NoFeedForward):
        return 0
    if isinstance(ffn, MoE):
        shared = 0 if ffn.shared is None else dense_bytes(ffn.shared, dtype)
        latent = 0 if ffn.latent_up is None else sum(ffn.latent_up.weight.shape) * dtype.itemsize
        return shared + latent + ffn.router.num_experts * torch.float32.itemsize
    assert isinstance(ffn, FeedForward)
    width, hidden = ffn.down_proj.weight.shape
    return (ffn.hidden_layers * hidden + width) * dtype.itemsize


def mixer_elements(mixer: Mixer, width: int) -> int:
    """Elements a token leaves at a mixer's matrices: outputs of those split by columns, inputs of those by rows.

    Of memories' matrices [outputs, memories, inputs], outputs as often as a token has a memory, and as many inputs.
    """
    placements = mixer.tensor_parallel()
    total = mixer.write_rows * width if mixer.write_rows > 1 else 0
    for path, module in mixer.named_modules():
        placement = placements.get(f"{path}.weight")
        if isinstance(placement, Shard) and isinstance(module, GroupedLinear):
            total += mixer.write_rows * module.weight.shape[0]
        if isinstance(placement, Shard) and isinstance(module, nn.Linear):
            total += module.weight.shape[placement.dim]
    return total


def feed_forward_bytes(ffn: nn.Module, dtype: torch.dtype) -> int:
    """Bytes a token leaves in a feed-forward."""
    if isinstance(ffn, NoFeedForward):
        return 0
    if isinstance(ffn, MoE):
        width, latent = ffn.router.weight.shape[1], ffn.experts.down.shape[2]
        shared = 0 if ffn.shared is None else feed_forward_bytes(ffn.shared, dtype)
        gated = 0 if ffn.shared_gate is None else width * dtype.itemsize  # what the gate multiplies
        narrowed = 0 if ffn.latent_up is None else latent * dtype.itemsize  # what widens it again
        return router_bytes(ffn, dtype) + experts_bytes(ffn, dtype) + shared + gated + narrowed
    assert isinstance(ffn, FeedForward)
    return 2 * ffn.hidden_layers * ffn.down_proj.weight.shape[1] * dtype.itemsize


def router_bytes(moe: MoE, dtype: torch.dtype) -> int:
    """Bytes a token leaves in the router: its own copy [D] in float32 where it computes in less, scores [E] twice, and
    the k chosen with their weights."""
    width, experts, top_k = moe.router.weight.shape[1], moe.router.num_experts, moe.router.top_k
    copied = width * torch.float32.itemsize if dtype.itemsize < torch.float32.itemsize else 0
    return copied + 2 * experts * torch.float32.itemsize + top_k * (torch.int64.itemsize + torch.float32.itemsize)


def experts_bytes(moe: MoE, dtype: torch.dtype) -> int:
    """Bytes a token leaves in the routed experts, on the path that a GPU would take.

    Step by step: rows in and out, 2 D (or `moe.latent_size`), gates and what they make, 3 F (2 F without gates), for
    each of k experts. All in one, where the experts lie on this rank: 2 F each. Both keep the order of the rows and its
    inverse. The token itself is the norm's output, which is counted there; its latent channels are kept by the latter.
    """
    experts, hidden, width = moe.experts.down.shape
    top_k, size = moe.router.top_k, dtype.itemsize
    indices = 2 * top_k * torch.int64.itemsize
    if moe.dispatcher.stays_here and moe.experts.would_take_tokens("cuda", dtype):
        counted = width * size if moe.latent_down is None else 0  # the norm's output
        return indices + int(all_in_one.budget(1, top_k, width, hidden, experts, size).saved_bytes) - counted
    steps = [
        dispatch.budget(1, top_k, width, size),
        grouped_mm.budget(top_k, width, (1 + moe.experts.gated) * hidden, experts, size),
        grouped_mm.budget(top_k, hidden, width, experts, size),
    ]
    activation = swiglu.budget(top_k, hidden, size).saved_bytes if moe.experts.gated else top_k * hidden * size
    return indices + int(sum(step.saved_bytes for step in steps) + activation)


def loss_bytes(model: Decoder, tokens: int, dtype: torch.dtype, tensor_ranks: int = 1) -> int:
    """An estimate for the head and loss: logits of one chunk in the compute type and once more in float32, their
    gradient in both, the hidden states' gradient [T, D], the head's gradient [V, D] (float32 with several chunks).

    V is this rank's part of the vocabulary.
    """
    width, vocab = model.recipe.hidden_size, model.recipe.vocab_size // tensor_ranks
    rows = max(1, min(tokens, CHUNK_ELEMENTS // vocab))
    head = torch.float32.itemsize if rows < tokens else dtype.itemsize
    chunk = rows * vocab * 2 * (dtype.itemsize + torch.float32.itemsize)
    return chunk + tokens * width * dtype.itemsize + vocab * width * head
