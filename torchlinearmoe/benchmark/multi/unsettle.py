"""Move a model away from its initial values, where errors hide: scales of one, biases and bounds of zero, states that
hardly count. The same move on every layout, a function of a parameter's name and of places in it alone."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from torchlinearmoe.optim.masters import local_part, read_master, write_master


@torch.no_grad()
def unsettle(model: nn.Module) -> None:
    """Add noise to every parameter."""
    for name, parameter in model.named_parameters():
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
        scale = 0.3 if parameter.dim() == 1 or "table" in name else 0.05
        noise = scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        master = read_master(parameter)
        mine = local_part(master)
        mine.add_(part_of(noise, parameter).to(mine))
        write_master(parameter, master)


def part_of(values: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of `values` when they are laid out like a tensor of their shape."""
    if not isinstance(like, DTensor):
        return values
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return values[tuple(slice(start, start + size) for start, size in zip(offset, shape))]
