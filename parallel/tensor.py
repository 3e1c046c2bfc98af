"""Tensor parallelism with sequence-sharded activations, applied from the words that modules declare.

Between the parts of a block each of the P ranks holds T / P tokens, a contiguous piece of the stream. A mixer or a
dense feed-forward takes the tokens of all ranks, does its share of heads or hidden channels, and gives each rank the
sums of its tokens back; norms, routers and experts see the rank's own tokens:

    x [T/P, D] -> norm -> gather [T, D] -> mixer, H / P heads -> partial sums [T, D] -> scatter [T/P, D] -> + x

A module says how its parameters lie over the ranks, in DTensor's words. What is replicated meets its rank's heads
alone, or, where nothing is said of it (norms, routers, gates), its rank's tokens. Either way each rank has a part of
its gradient; the parts are summed once a step, `sum_partial_gradients`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from torchlinearmoe.layers.mlp import FeedForward
from torchlinearmoe.layers.norm import RMSNorm
from torchlinearmoe.mixers.base import Mixer, SharedModule
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.moe.experts import Experts
from torchlinearmoe.optim.gradients import gradient_parts, set_earlier, summed
from torchlinearmoe.optim.masters import laid_out_like, rest_of
from torchlinearmoe.parallel.exchange.collectives import gather_rows, scatter_rows, sum_over
from torchlinearmoe.parallel.local import split_tensor
from torchlinearmoe.parallel.vocabulary import split_vocabulary


def apply_tensor_parallel(model: Decoder, mesh: DeviceMesh) -> None:
    """Split the meta `model` over the ranks of `mesh`, [tensor], in place."""
    group, rank = mesh.get_group().group_name, mesh.get_local_rank()
    placements = declared_placements(model)
    for path, owner in list(model.named_modules()):
        if not isinstance(owner, Experts):  # those are spread over `ep`, or sharded over these ranks too
            _split(path, owner, placements, mesh)
        if isinstance(owner, Mixer):
            owner.first_head = rank * owner.heads // mesh.size()
        if isinstance(owner, FeedForward):
            _between_ranks(owner, group)
    for layer in model.layers.values():
        assert isinstance(layer.mixer, Mixer)
        _between_ranks(layer.mixer, group)
    split_vocabulary(model, group, rank, mesh.size())


def declared_placements(model: Decoder) -> dict[str, Placement]:
    """What all modules say of their parameters, by the paths in `model`."""
    placements: dict[str, Placement] = {"embed.weight": Shard(0), "head.weight": Shard(0)}
    for name, shared in model.shared.items():
        assert isinstance(shared, SharedModule)
        placements |= _under(f"shared.{name}", shared.tensor_parallel())
    for index, layer in model.layers.items():
        mixer, path = layer.mixer, f"layers.{index}.mixer"
        assert isinstance(mixer, Mixer)
        own = mixer.tensor_parallel()
        assert own.keys() == {name for name, _ in mixer.named_parameters()}, f"{mixer.name}: one for each parameter"
        placements |= _under(path, own)
    for path, module in model.named_modules():
        if isinstance(module, FeedForward):
            placements |= _under(path, module.tensor_parallel())
    return placements


def _under(path: str, placements: dict[str, Placement]) -> dict[str, Placement]:
    return {f"{path}.{name}": placement for name, placement in placements.items()}


def _split(path: str, owner: nn.Module, placements: dict[str, Placement], mesh: DeviceMesh) -> None:
    """Lay the direct parameters of `owner` over the ranks."""
    for name, parameter in list(owner.named_parameters(recurse=False)):
        placement = placements.get(f"{path}.{name}", Replicate())
        setattr(owner, name, nn.Parameter(split_tensor(parameter, mesh, placement)))
        if isinstance(owner, RMSNorm) and not placement.is_replicate():  # a norm that spans heads
            group = mesh.get_group().group_name
            owner.mean_square = partial(mean_square_over, group=group, ranks=mesh.size())


def mean_square_over(x: Tensor, group: str, ranks: int) -> Tensor:
    """Mean square of the last dim, of which each rank holds an equal part: [..., width / P] -> [..., 1]."""
    return sum_over(x.square().sum(-1, keepdim=True), group) / (x.shape[-1] * ranks)


def _between_ranks(module: nn.Module, group: str) -> None:
    """Feed `module` the tokens of all ranks and give each rank the sums of its own."""

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x_TD, *rest = args
        return (gather_rows(x_TD, group), *rest)

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return scatter_rows(output, group)
        y_TD, state, carried = output
        if state is not None:
            raise ValueError("a model split over tensor-parallel ranks cannot decode; load_model gives a whole one")
        return scatter_rows(y_TD, group), state, carried

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def partial_gradients(model: nn.Module) -> list[DTensor]:
    """The parameters of whose gradients each tensor-parallel rank has a part; none in a model that is not split."""
    found = (parameter for parameter in model.parameters() if isinstance(parameter, DTensor))
    return [parameter for parameter in found if is_split(parameter) is False]


def is_split(parameter: Tensor) -> bool | None:
    """Whether tensor-parallel ranks have parts of `parameter` or all of it; None for one that is not laid over them."""
    if not isinstance(parameter, DTensor) or "tensor" not in (axes := parameter.device_mesh.mesh_dim_names or ()):
        return None
    return not parameter.placements[axes.index("tensor")].is_replicate()


@torch.no_grad()
def sum_partial_gradients(model: nn.Module) -> None:
    """Sum them over the tensor-parallel ranks; once a step, after its last backward, all in one all-reduce."""
    parameters = partial_gradients(model)
    if not parameters:
        return
    gradients = []
    for parameter in parameters:
        own = gradient_parts(parameter)
        assert own is not None, "every parameter of a training step has a gradient"
        gradients.append(summed(own))
        set_earlier(parameter, None)
    flat = torch.cat([gradient.flatten().to(_sum_dtype(gradient)) for gradient in gradients])
    dist.all_reduce(flat, group=parameters[0].device_mesh.get_group("tensor"))
    parts = flat.split([gradient.numel() for gradient in gradients])
    for parameter, gradient, part in zip(parameters, gradients, parts):
        if rest_of(parameter) is None:
            gradient.copy_(part.view_as(gradient))
        else:  # a sum stays wider than what it is a sum of
            parameter.grad = laid_out_like(parameter, part.view_as(gradient))


def _sum_dtype(gradient: Tensor) -> torch.dtype:
    return torch.promote_types(gradient.dtype, torch.float32)
