"""The global norm that gradients are clipped by, over parameters that live on different meshes.

The squared norm of a gradient is the sum of the squared norms of its distinct pieces. A piece is what a rank holds;
pieces differ along the mesh axes that shard the tensor and repeat along those that replicate it. So each rank sums
the squares of its local pieces, one sum for each set of sharding axes, and each sum is all-reduced over those axes
and no others:

    dense, FSDP            (Shard)             all-reduce over dp_shard_cp
    dense, HSDP            (Replicate, Shard)  all-reduce over dp_shard_cp, not over dp_replicate
    dense, FSDP + TP       (Shard, Shard)      all-reduce over dp_shard_cp, then tp
    norm,  FSDP + TP       (Shard, Replicate)  all-reduce over dp_shard_cp
    expert                 (Shard, Shard)      all-reduce over efsdp, then ep

torch's own `clip_grad_norm_` refuses such a mixture (pytorch issue 180346). The host never waits: the norm stays on the
device.
"""

from collections.abc import Collection, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from torchlinearmoe.optim.gradients import KERNEL_TYPES, Parts, for_launch, gradient_parts, summed, types_of


@torch.no_grad()
def gradient_norm(
    parameters: nn.Module | Iterable[torch.Tensor],
    *,
    pp_group: dist.ProcessGroup | None = None,
    counted_elsewhere: Collection[torch.Tensor] = (),
) -> torch.Tensor:
    """The global 2-norm of the gradients; nothing is scaled, the optimizer takes the factor along.

    parameters: a model, or its parameters, in the same order on all ranks of a pipeline stage. Those without a
        gradient count as zero (their rank still takes part in the collectives).
    pp_group: the pipeline stages' group; each stage passes its own parameters.
    counted_elsewhere: parameters of this stage whose copy on another stage is counted there (one shared by stages,
        its gradient already summed over them): not added to the norm.
    Returns a 0-dim float32 tensor (float64 when a parameter is), equal on all ranks; NaN or infinite when a gradient
    is, and the gradients are then not usable.
    """
    tensors = list(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)
    trainable = [tensor for tensor in tensors if tensor.requires_grad]
    assert trainable, "no trainable parameter"
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in trainable) else torch.float32
    elsewhere = {id(parameter) for parameter in counted_elsewhere}

    # Keyed by the groups to reduce over. Taken from the parameters, not from the gradients, so that every rank
    # issues the same collectives in the same order even where a gradient is absent.
    pieces: dict[tuple[dist.ProcessGroup, ...], list[Parts]] = {}
    for parameter in trainable:
        if id(parameter) in elsewhere:
            continue
        local = pieces.setdefault(_sharding_groups(parameter), [])
        parts = gradient_parts(parameter)
        if parts is not None and parts[0].numel():
            local.append(parts)

    square = torch.zeros((), dtype=dtype, device=trainable[0].device)
    for groups, local in pieces.items():
        part = _square_sum(local, square)
        for group in groups:
            dist.all_reduce(part, group=group)
        square += part
    if pp_group is not None:
        dist.all_reduce(square, group=pp_group)
    return square.sqrt()


def _sharding_groups(parameter: torch.Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The process groups along which the ranks hold different pieces of `parameter`."""
    if not isinstance(parameter, DTensor):
        return ()
    mesh = parameter.device_mesh
    return tuple(
        mesh.get_group(axis)
        for axis, placement in enumerate(parameter.placements)
        if not placement.is_replicate() and mesh.size(axis) > 1
    )


@torch.no_grad()
def _square_sum(gradients: Sequence[Parts], like: torch.Tensor) -> torch.Tensor:
    """Sum of the squares of all elements, accumulated in the dtype of `like`: 0-dim, always in the same order."""
    if not gradients:
        return torch.zeros_like(like)
    kinds: dict[object, list[Parts]] = {}
    for parts in gradients:
        kinds.setdefault(types_of(parts), []).append(parts)
    known = all(part.dtype in KERNEL_TYPES for parts in gradients for part in parts if part is not None)
    if like.device.type == "cuda" and like.dtype == torch.float32 and known:
        return torch.stack([_in_one_launch(some) for some in kinds.values()]).sum()
    norms = torch._foreach_norm([summed(parts) for parts in gradients], 2.0, dtype=like.dtype)
    return torch.stack(norms).square().sum()


def _in_one_launch(gradients: Sequence[Parts]) -> torch.Tensor:
    from torchlinearmoe.kernels.optimizer import triton
    from torchlinearmoe.kernels.optimizer.blocks import blocks_of

    blocks = blocks_of(tuple(last.numel() for last, _ in gradients), gradients[0][0].device)
    return triton.square_sum(blocks, for_launch(gradients))
