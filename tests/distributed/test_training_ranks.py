"""What ranks know of each other: meshes, and one deciding for the others."""

import time
import warnings
from datetime import timedelta

import pytest
import torch.distributed as dist
from harness import RankPool
from torch.distributed import distributed_c10d

from torchlinearmoe.errors import UserError
from torchlinearmoe.parallel.mesh import Meshes, resolve_degrees
from torchlinearmoe.recipe import ParallelRecipe
from torchlinearmoe.runtime import on_rank_0


def places(rank: int, data_replicate: int) -> tuple[list[int], list[int], list[int], int]:
    """(replicas, shards, whose tokens make up a step) as global ranks, and which batches this rank takes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        degrees = resolve_degrees(ParallelRecipe(data_replicate=data_replicate), dist.get_world_size())
        meshes = Meshes(degrees, "cpu")
        fsdp = meshes.fsdp
    names = ("data_replicate", "fsdp") if data_replicate > 1 else ("fsdp",)
    assert fsdp.mesh_dim_names == names
    groups = [dist.get_process_group_ranks(fsdp.get_group(name)) for name in names]
    replicas = groups[0] if data_replicate > 1 else [rank]
    return replicas, groups[-1], dist.get_process_group_ranks(meshes.tokens_group), meshes.data_rank


@pytest.mark.parametrize(
    "data_replicate, expected",
    [
        (1, [([r], [0, 1, 2, 3], [0, 1, 2, 3], r) for r in range(4)]),
        (2, [([r % 2, r % 2 + 2], [r // 2 * 2, r // 2 * 2 + 1], [0, 1, 2, 3], r) for r in range(4)]),
        (4, [([0, 1, 2, 3], [r], [0, 1, 2, 3], r) for r in range(4)]),
    ],
)
def test_shards_are_neighbours_and_every_rank_brings_tokens(
    ranks: RankPool, data_replicate: int, expected: list[tuple[list[int], list[int], list[int], int]]
) -> None:
    assert ranks(4, places, data_replicate) == expected


def ask(rank: int, fails: bool) -> str:
    def action() -> str:
        time.sleep(0.2)
        if fails:
            raise UserError("no such corpus")
        return f"rank {rank}"

    try:
        return on_rank_0(action)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("fails, answer", [(False, "rank 0"), (True, "no such corpus")])
def test_what_rank_0_finds_is_everybodys_and_so_is_its_mistake(ranks: RankPool, fails: bool, answer: str) -> None:
    assert ranks(3, ask, fails) == [answer] * 3


def ask_patiently(rank: int) -> str:
    distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
    return on_rank_0(lambda: time.sleep(2.5) or "at last")


def test_others_wait_for_rank_0_beyond_the_limit_of_collectives(ranks: RankPool) -> None:
    assert ranks(2, ask_patiently) == ["at last"] * 2
