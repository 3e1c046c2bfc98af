"""Split parameters, and the plain tensors that forwards see in their place.

A parameter split over `tensor` or `ep` is a DTensor, so that sharding, clipping, checkpoints and initial values know
what it is a part of. Kernels, compiled regions and the modules themselves should not: while a unit of FSDP runs its
forward, each of its split parameters is shadowed by its local part, an attribute of the same name. Gradients flow
through it to the DTensor; outside a forward nothing is different.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Shard

from torchlinearmoe.models.decoder import Decoder

SPLIT_AXES = ("tensor", "ep")


def split_tensor(tensor: Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    """A meta tensor as one of which every rank of the one-axis `mesh` holds an equal part, or all of it."""
    local = tensor.detach()
    if isinstance(placement, Shard):
        dim = placement.dim
        assert tensor.shape[dim] % mesh.size() == 0, "recipes that ask for this are refused"
        local = local.chunk(mesh.size(), dim)[mesh.get_local_rank()].contiguous()
    return DTensor.from_local(local, mesh, [placement], run_check=False, shape=tensor.shape, stride=tensor.stride())


def shadow_split_parameters(model: Decoder) -> None:
    """Shadow the split parameters of every unit of `model`; call it after FSDP.

    Layers are units whether FSDP knows them or not, because a checkpointed one runs again outside the model's forward.
    So are shared modules, which a zero-bubble stage runs once more after the backwards of its step.
    """
    shards = (module for module in model.modules() if isinstance(module, FSDPModule))
    units = {model, *model.layers.values(), *model.shared.values(), *shards}
    for unit in units:
        shadow(unit, units)


def shadow(unit: nn.Module, units: Collection[nn.Module] = ()) -> None:
    """Shadow the split parameters of `unit` while it runs, those of other `units` inside it left out."""
    owned = [
        (owner, name)
        for owner in _without_inner(unit, units)
        for name, parameter in owner.named_parameters(recurse=False)
        if isinstance(parameter, DTensor) and set(parameter.device_mesh.mesh_dim_names or ()) & set(SPLIT_AXES)
    ]
    if not owned:
        return

    forward = unit.forward

    def shadowed(*args: Any, **kwargs: Any) -> Any:
        for owner, name in owned:
            parameter = owner._parameters[name]  # as FSDP has gathered it
            assert isinstance(parameter, DTensor)
            owner.__dict__[name] = parameter.to_local()
        try:
            return forward(*args, **kwargs)
        finally:
            for owner, name in owned:
                owner.__dict__.pop(name, None)

    unit.forward = shadowed


def _without_inner(module: nn.Module, units: Collection[nn.Module]) -> Iterator[nn.Module]:
    yield module
    for child in module.children():
        if child not in units:
            yield from _without_inner(child, units)
