"""Fully sharded data parallelism with sums and nothing but sums.

Losses arrive divided by the whole step's tokens, so gradients are summed over ranks and never averaged: FSDP's own
division is off everywhere. Master weights are float32 (float64 stays). Modules marked `keep_fp32` (decays, routers,
lower bounds) compute in float32, those of a layer as one unit; all others compute in the run's type. Experts are a unit
of their own where they are sharded over other ranks than the rest, because other ranks hold other experts.

A mesh of one rank has nothing to gather and nothing to reduce: units over it are left out, and their parameters are
plain, or split over `tensor` and `ep` alone (`optim.masters` keeps their masters):

    ranks                                    dense        experts
    1; tensor ranks with their experts       plain        plain
    tensor = 2, expert = 1                   plain        sharded over the two
    data_shard = 8, expert = 8               sharded      plain, other ones on every rank
    data_replicate = 2, data_shard = 1       replicated   replicated
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.module import traits
from torchlinearmoe.moe.layer import MoE


def apply_fsdp(
    model: Decoder,
    mesh: DeviceMesh,
    expert_mesh: DeviceMesh,
    dtype: torch.dtype,
    *,
    reshard_after_forward: bool = True,
    reduce_dtype: torch.dtype = torch.float32,
) -> None:
    """Shard `model` in place over `mesh` ([fsdp], or [data_replicate, fsdp]), computing in `dtype`.

    Experts are sharded over `expert_mesh` ([efsdp], or [data_replicate, efsdp]). Gradients travel in `reduce_dtype`
    where they were computed in a narrower type than float32.
    """
    dense, experts = mesh.size() > 1, expert_mesh.size() > 1
    wide = torch.promote_types(dtype, torch.float32)
    reduced = torch.promote_types(dtype, reduce_dtype)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(param_dtype=wide, reduce_dtype=wide, cast_forward_inputs=False)
    stacks = {
        p for layer in model.layers.values() if isinstance(layer.ffn, MoE) for p in layer.ffn.experts.parameters()
    }
    # Where the experts lie on the ranks of all else, they are gathered with their layer.
    apart = experts and not (dense and expert_mesh == mesh)
    left_out = set() if experts else stacks

    def placement(parameter: nn.Parameter) -> Shard | None:
        return expert_placement(parameter, expert_mesh.size(-1)) if parameter in stacks else None

    def shard(module: nn.Module | list[nn.Module], policy: MixedPrecisionPolicy, reshard: bool) -> None:
        fully_shard(
            module,  # pyright: ignore
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=reshard,
            shard_placement_fn=placement,
            ignored_params=left_out,
        )

    for unit in _exact_units(model) if dense else ():
        shard(unit, exact, reshard_after_forward)
    for layer in model.layers.values():
        if apart and isinstance(layer.ffn, MoE):
            fully_shard(
                layer.ffn.experts,
                mesh=expert_mesh,
                mp_policy=policy,
                reshard_after_forward=reshard_after_forward,
                shard_placement_fn=placement,
            )
        if not dense:
            continue
        shard(layer, policy, reshard_after_forward)
        if apart and isinstance(layer.ffn, MoE):
            # The host waits for the counts of an exchange before it comes to the experts: gather them before that.
            assert isinstance(layer, FSDPModule) and isinstance(layer.ffn.experts, FSDPModule)
            layer.set_modules_to_forward_prefetch([layer.ffn.experts])
    if dense and not model.recipe.tie_embeddings:
        if model.holds_first:
            shard(model.embed, policy, reshard_after_forward)
        if model.holds_last:
            # Backward starts with these two: keep them gathered.
            shard([model.norm, model.head], policy, False)
    if dense:
        shard(model, policy, False)
    elif experts and stacks:
        # A root of the experts' units, without parameters of its own: they share streams and know each other's order.
        left_out = {p for p in model.parameters() if p not in stacks}
        shard(model, policy, False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Gloo has no pre-multiplied sum, and NCCL is told to sum as well.
            module.set_force_sum_reduction_for_comms(True)


def _exact_units(model: Decoder) -> list[list[nn.Module]]:
    """Modules that compute in float32, those of a layer together: few small gathers are better than many."""
    shared = [[module] for module in model.shared.modules() if _is_exact(module)]
    return shared + [some for layer in model.layers.values() if (some := [*filter(_is_exact, layer.modules())])]


def _is_exact(module: nn.Module) -> bool:
    return traits(module).keep_fp32 and any(True for _ in module.parameters())


def expert_placement(parameter: nn.Parameter, ranks: int) -> Shard:
    """The dim an expert stack [E, ...] is cut along: whole experts while a rank of `ep` has enough of them.

    With fewer experts than ranks, the first other dim that the ranks divide; where none is, dim 0 with padding.
    """
    shape = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).shape
    if len(shape) == 3 and shape[0] < ranks:
        for dim in (1, 2):
            if shape[dim] % ranks == 0:
                return Shard(dim)
    return Shard(0)


def set_gradient_sync(model: nn.Module, sync: bool) -> None:
    """Reduce gradients after the next backward, or keep them on this rank (accumulation)."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)


def reshard(model: nn.Module) -> None:
    """Free the gathered weights that a forward without a backward leaves behind."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
