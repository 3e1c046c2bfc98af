"""Float32 masters behind bfloat16 weights, for parameters that one rank holds whole.

A parameter that FSDP shards keeps its float32 master in its shard and is cast when it is gathered. One that is nowhere
sharded computes from a bfloat16 weight as it lies; the 16 bits that this lacks of its master lie beside it, the two
making 4 bytes (`kernels.optimizer.rounding`). Who saves, loads or draws such a parameter asks here for its master.

Gradients arrive in bfloat16; several micro-batches are summed in float32, so `.grad` may be of either type.

A rest is an attribute of its parameter: it does not follow `copy.deepcopy` or `Module.to`, and
`Module.load_state_dict`, which would write the weight alone, is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchlinearmoe.kernels.optimizer.rounding import join_halves, split_halves
from torchlinearmoe.module import traits

SHARDING_AXES = {"fsdp", "efsdp", "data_replicate"}
"""Mesh axes over which FSDP lays parameters."""


def hold_masters(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn every float32 parameter that computes in bfloat16 and that FSDP does not shard into a weight and its rest.

    Modules marked `keep_fp32` stay. A `dtype` other than bfloat16 leaves all as it is. Works on the meta device too.
    """
    if dtype == torch.bfloat16:
        made: dict[nn.Parameter, nn.Parameter] = {}
        _hold(model, made)
        if made:
            model.register_load_state_dict_pre_hook(_refuse_to_load)


def _refuse_to_load(module: nn.Module, *_: Any) -> None:
    raise RuntimeError("load_state_dict writes weights without their masters; load a checkpoint instead")


def _hold(module: nn.Module, made: dict[nn.Parameter, nn.Parameter]) -> None:
    if traits(module).keep_fp32:
        return
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.dtype == torch.float32 and not is_sharded(parameter):
            if parameter not in made:
                made[parameter] = _halved(parameter)
            setattr(module, name, made[parameter])
    for child in module.children():
        _hold(child, made)


@torch.no_grad()
def _halved(parameter: nn.Parameter) -> nn.Parameter:
    weight, rest = split_halves(local_part(parameter.detach()))
    result = nn.Parameter(laid_out_like(parameter, weight), requires_grad=parameter.requires_grad)
    result.grad_dtype = None  # pyright: ignore  # bfloat16, or float32 for a sum of several
    result.master_rest = rest  # pyright: ignore[reportAttributeAccessIssue]
    return result


def is_sharded(parameter: Tensor) -> bool:
    """Whether FSDP has laid it over ranks."""
    if not isinstance(parameter, DTensor):
        return False
    return bool(SHARDING_AXES & set(parameter.device_mesh.mesh_dim_names or ()))


def rest_of(parameter: Tensor) -> Tensor | None:
    """The local int16 rest of a parameter's master; None where the parameter is its own master."""
    return vars(parameter).get("master_rest")


@torch.no_grad()
def read_master(parameter: Tensor) -> Tensor:
    """The master, laid out like the parameter: the parameter itself, or float32 made of its halves."""
    rest = rest_of(parameter)
    if rest is None:
        return parameter.detach()
    return laid_out_like(parameter, join_halves(local_part(parameter.detach()), rest))


@torch.no_grad()
def write_master(parameter: Tensor, master: Tensor) -> None:
    """Make `master`, laid out like the parameter, its master; nothing to do where it is the parameter itself."""
    rest = rest_of(parameter)
    source, target = local_part(master), local_part(parameter.detach())
    if rest is not None:
        weight, lower = split_halves(source.float())
        target.copy_(weight)
        rest.copy_(lower)
    elif source.data_ptr() != target.data_ptr():
        target.copy_(source)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def laid_out_like(parameter: Tensor, local: Tensor) -> Tensor:
    """`local`, this rank's part, as a tensor with the parameter's layout."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
