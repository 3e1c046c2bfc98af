"""The pool of rank processes itself: results, errors, deaths and hangs."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from harness import RankError, RankPool


def gathered_ranks(rank: int, offset: int) -> torch.Tensor:
    parts = [torch.zeros(1) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, torch.tensor([float(rank + offset)]))
    return torch.cat(parts)


def process_id(rank: int) -> int:
    return os.getpid()


def raise_on(rank: int, bad: int) -> None:
    if rank == bad:
        raise KeyError("lost-key")
    dist.barrier()


def die_on(rank: int, bad: int) -> None:
    if rank == bad:
        os._exit(7)
    dist.barrier()


def sleep_on_last(rank: int) -> None:
    if rank == dist.get_world_size() - 1:
        time.sleep(60)


def threads_and_device(rank: int) -> tuple[int, bool, torch.dtype]:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    return torch.get_num_threads(), torch.cuda.is_available(), dtype


def threads(rank: int) -> int:
    """Of this process, those of the call's own group among them."""
    return len(os.listdir("/proc/self/task"))


def column_parallel(rank: int, spare_groups: int) -> torch.Tensor:
    """DTensor work on an equal mesh whose groups get other names each time."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    for _ in range(spare_groups):
        dist.new_group()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    x = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
    product = x @ x.t().contiguous()
    assert isinstance(product, DTensor)
    return product.redistribute(placements=[Shard(1)]).full_tensor()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_back_by_rank(ranks: RankPool, world_size: int) -> None:
    results = ranks(world_size, gathered_ranks, 10)
    assert len(results) == world_size
    for result in results:
        assert result.tolist() == [10.0 + r for r in range(world_size)]


def test_workers_are_reused(ranks: RankPool) -> None:
    assert ranks(2, process_id) == ranks(2, process_id)


def test_ranks_are_single_threaded_without_gpu_and_reset_between_calls(ranks: RankPool) -> None:
    for _ in range(2):
        assert ranks(2, threads_and_device) == [(1, False, torch.float32)] * 2


def test_an_equal_mesh_in_a_later_call_uses_the_living_group(ranks: RankPool) -> None:
    for spare_groups in (2, 0, 1):
        for result in ranks(2, column_parallel, spare_groups):
            assert torch.equal(result, torch.full((4, 4), 4.0))


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted in /proc")
def test_the_threads_of_a_call_s_groups_end_with_it(ranks: RankPool) -> None:
    before = ranks(2, threads)
    for spare_groups in (3, 5):
        ranks(2, column_parallel, spare_groups)
    assert all(left <= right for left, right in zip(ranks(2, threads), before))


def test_a_raising_rank_is_named_with_its_traceback_and_the_pool_recovers(ranks: RankPool) -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2: Traceback(.|\n)*in raise_on(.|\n)*lost-key"):
        ranks(2, raise_on, 1)
    assert ranks(2, gathered_ranks, 0)[1].tolist() == [0.0, 1.0]


def test_a_dead_rank_is_named_and_the_pool_recovers(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="rank 0 of 2: died with exit code 7"):
        ranks(2, die_on, 0)
    assert ranks(2, gathered_ranks, 0)[0].tolist() == [0.0, 1.0]


def test_a_hanging_rank_is_named_with_its_stack_and_stopped(ranks: RankPool) -> None:
    hanging = ranks(2, process_id)[1]
    with pytest.raises(RankError, match=r"rank 1 of 2: no answer after 2 s(.|\n)*in sleep_on_last"):
        ranks(2, sleep_on_last, timeout=2)
    with pytest.raises(ProcessLookupError):
        os.kill(hanging, 0)


def test_more_ranks_than_the_pool_allows_is_refused(ranks: RankPool) -> None:
    with pytest.raises(ValueError, match="world_size=9 is not in 1..8"):
        ranks(9, process_id)
