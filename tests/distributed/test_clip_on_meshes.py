"""The global norm over several ranks and meshes equals that of the whole tensors on one process."""

import pytest
import torch
import torch.distributed as dist
from harness import RankPool
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from torchlinearmoe.parallel.clip import gradient_norm

# name: (shape, mesh, placements). "grid" is 2 x 2, "flat" the same four ranks in one axis.
LAYOUTS: dict[str, tuple[tuple[int, ...], str | None, list[Placement]]] = {
    "dense": ((9, 5), "flat", [Shard(0)]),  # uneven: 3, 3, 3, 0 rows
    "dense_tp": ((6, 4), "grid", [Shard(0), Shard(1)]),
    "expert": ((4, 3, 8), "grid", [Shard(1), Shard(0)]),
    "norm": ((8,), "grid", [Shard(0), Replicate()]),
    "replica": ((5, 4), "grid", [Replicate(), Shard(0)]),
    "scalar": ((), "flat", [Replicate()]),
    "plain": ((3, 2), None, []),
}


def whole_gradients(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(17)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, (shape, _, _) in LAYOUTS.items()
    }


def spread(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """The parameters of LAYOUTS with their gradients, on four ranks."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
    meshes = {"grid": grid, "flat": grid._flatten("flat")}
    parameters = {}
    for name, gradient in whole_gradients(dtype).items():
        _, mesh, placements = LAYOUTS[name]
        if mesh is not None:
            gradient = distribute_tensor(gradient, meshes[mesh], placements)
        parameters[name] = nn.Parameter(torch.zeros_like(gradient))
        parameters[name].grad = gradient
    return parameters


def norm_of(rank: int, dtype: torch.dtype) -> torch.Tensor:
    return gradient_norm(spread(dtype).values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mixed_meshes_and_replicas_count_every_element_once(ranks: RankPool, dtype):
    expected = nn.utils.get_total_norm(list(whole_gradients(dtype).values()))
    for norm in ranks(4, norm_of, dtype):
        assert norm.dtype == dtype
        torch.testing.assert_close(norm, expected)


def norm_with_a_gradient_missing(rank: int, missing_on: int) -> torch.Tensor:
    parameters = spread(torch.float64)
    if rank == missing_on:  # an expert without tokens
        parameters["expert"].grad = None
    return gradient_norm(parameters.values())


def test_gradient_missing_on_one_rank_counts_as_zero_there(ranks: RankPool):
    whole = whole_gradients(torch.float64)
    whole["expert"][2:, 2:] = 0  # what rank 3 = (1, 1) holds: uneven Shard(1) leaves it the last row of three
    expected = torch.stack([gradient.norm() for gradient in whole.values()]).norm()
    for norm in ranks(4, norm_with_a_gradient_missing, 3):
        torch.testing.assert_close(norm, expected)


def norm_of_stages(rank: int) -> torch.Tensor:
    """Two stages of two ranks; each has a sharded matrix of its own and a copy of one shared parameter."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "fsdp"))
    stage = mesh.get_local_rank("pp")
    own = nn.Parameter(distribute_tensor(torch.zeros(4, 3, dtype=torch.float64), mesh["fsdp"], [Shard(0)]))
    own.grad = distribute_tensor(torch.full((4, 3), 1.0 + stage, dtype=torch.float64), mesh["fsdp"], [Shard(0)])
    shared = nn.Parameter(distribute_tensor(torch.zeros(6, dtype=torch.float64), mesh["fsdp"], [Shard(0)]))
    shared.grad = distribute_tensor(torch.full((6,), 3.0, dtype=torch.float64), mesh["fsdp"], [Shard(0)])
    elsewhere = [shared] if stage == 1 else []
    norm = gradient_norm([own, shared], pp_group=mesh.get_group("pp"), counted_elsewhere=elsewhere)
    dist.barrier()
    return norm


def test_pipeline_stages_share_one_norm_and_count_a_shared_parameter_once(ranks: RankPool):
    expected = torch.tensor(12 * 1.0 + 12 * 4.0 + 6 * 9.0, dtype=torch.float64).sqrt()
    for norm in ranks(4, norm_of_stages):
        torch.testing.assert_close(norm, expected)
