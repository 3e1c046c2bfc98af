"""Initial values are the same over any mesh, and a rank draws only the blocks that it holds a part of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from torchlinearmoe import initialize as init
from torchlinearmoe.initialize import Normal, Orthogonal, Rows, Uniform, initialize, set_initializers

EXPERTS = 6


class Experts(nn.Module):
    """Two expert stacks; six do not divide by four ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(EXPERTS, 12, 5))
        self.down = nn.Parameter(torch.empty(EXPERTS, 12, 3))
        set_initializers(self, up=Normal(1.0), down=Normal(0.5))


class Model(nn.Module):
    """Parameters of every kind: many blocks, one block, fewer rows than ranks, one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.long = nn.Parameter(torch.empty(2 * init.ROWS + 77, 3))
        self.small = nn.Parameter(torch.empty(7, 5))
        self.tiny = nn.Parameter(torch.empty(2, 4))
        self.flat = nn.Parameter(torch.empty(init.ROWS + 9))
        self.rows = nn.Parameter(torch.empty(init.ROWS + 3, 2))
        self.orthogonal = nn.Parameter(torch.empty(init.ROWS + 50, 70))
        set_initializers(
            self,
            long=Normal(1.0),
            small=Uniform(-1.0, 1.0),
            tiny=Normal(1.0),
            flat=Uniform(0.0, 1.0),
            rows=Rows(_rows),
            orthogonal=Orthogonal(1.0),
        )
        self.experts = Experts()


def _rows(rows: Tensor) -> Tensor:
    return rows.float()


def _one_process() -> dict[str, Tensor]:
    model = Model()
    initialize(model, 3)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _full(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


def _initialized(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, list[int]], dict[str, list[int]]]:
    """(full values, blocks this rank drew, blocks that its shards touch) by parameter name."""
    keys: list[str] = []
    original = init._generator

    def recording(key: str, device: torch.device) -> torch.Generator:
        keys.append(key)
        return original(key, device)

    init._generator = recording
    try:
        initialize(model, 3)
    finally:
        init._generator = original
    drawn: dict[str, list[int]] = {}
    for key in keys:
        _, name, block = key.split("/")
        drawn.setdefault(name, []).append(int(block))
    touched = {}
    for name, parameter in model.named_parameters():
        rows = _local_rows(parameter)
        touched[name] = (rows // (1 if parameter.dim() == 3 else init.ROWS)).unique().tolist()
    return {name: _full(parameter) for name, parameter in model.named_parameters()}, drawn, touched


def _local_rows(parameter: Tensor) -> Tensor:
    """The rows of dim 0 that this rank holds a part of, cut as torch.chunk cuts; the last mesh axis cuts first."""
    rows = torch.arange(parameter.shape[0])
    if not isinstance(parameter, DTensor):
        return rows
    coordinates = parameter.device_mesh.get_coordinate()
    assert coordinates is not None
    for size, index, placement in reversed(list(zip(parameter.device_mesh.shape, coordinates, parameter.placements))):
        if isinstance(placement, Shard | _StridedShard):
            length = parameter.shape[placement.dim] if placement.dim else rows.shape[0]
            start = index * -(-length // size)
            if placement.dim == 0:
                rows = rows[start : start + -(-length // size)]
            elif start >= length:
                return rows[:0]
    return rows


def _fsdp(rank: int, sizes: tuple[int, ...], expert_dim: int) -> Any:
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])
    with torch.device("meta"):
        model = Model()
    fully_shard(model.experts, mesh=mesh, shard_placement_fn=lambda _: Shard(expert_dim))
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    return _initialized(model)


def _tensor_parallel_then_fsdp(rank: int, dim: int) -> Any:
    """Weights split over tensor-parallel ranks first (`dim`), each part over FSDP ranks after."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    model = Model()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            placement = Shard(min(dim, parameter.dim() - 1))
            split = distribute_tensor(parameter.detach(), mesh["tensor"], [placement])
            setattr(module, name, nn.Parameter(split))
    fully_shard(model, mesh=mesh["shard"])
    return _initialized(model)


def _plain(rank: int, placements: tuple[Any, ...]) -> Any:
    """DTensors without FSDP, which may be uneven along any dimension."""
    mesh = init_device_mesh("cpu", (3,) if len(placements) == 1 else (2, 2))
    model = Model()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            fitting = [p if not isinstance(p, Shard) or p.dim < parameter.dim() else Replicate() for p in placements]
            setattr(module, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, fitting)))
    return _initialized(model)


def _check(results: list[Any]) -> None:
    expected = _one_process()
    for values, drawn, touched in results:
        assert values.keys() == expected.keys()
        for name, value in values.items():
            assert torch.equal(value, expected[name]), name
            assert drawn.get(name, []) == touched[name], name


@pytest.mark.parametrize("sizes", [(1,), (2,), (3,), (4,), (2, 2)], ids=str)
@pytest.mark.parametrize("expert_dim", [0, 1])
def test_fsdp_and_replicas_start_from_the_values_of_one_process(ranks, sizes: tuple[int, ...], expert_dim: int):
    _check(ranks(math.prod(sizes), _fsdp, sizes, expert_dim))


@pytest.mark.parametrize("dim", [0, 1])
def test_tensor_parallel_under_fsdp_starts_from_the_values_of_one_process(ranks, dim: int):
    _check(ranks(4, _tensor_parallel_then_fsdp, dim))


@pytest.mark.parametrize(
    "placements", [(Shard(0),), (Shard(1),), (Shard(2),), (Shard(0), Shard(1)), (Shard(1), Shard(0))], ids=str
)
def test_uneven_shards_along_any_dimension_start_from_the_values_of_one_process(ranks, placements: tuple[Any, ...]):
    _check(ranks(3 if len(placements) == 1 else 4, _plain, placements))
