"""A world of any size in one process: its process group moves nothing, its model holds nothing.

The meshes, the sharding and the optimizer are those of training, so a layout that cannot be built is refused here in
the same words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param

from torchlinearmoe.errors import UserError


@contextmanager
def pretended_world(size: int, rank: int) -> Iterator[None]:
    """A default process group in which this process is `rank` of `size`; collectives return at once.

    Nothing of it is left for the next one: torch keeps shardings with the mesh, and the rank in it, that they were made
    for, and another rank's equal mesh finds them.
    """
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not 0 <= rank < size:
        raise UserError(f"rank = {rank}: must lie between 0 and {size - 1} in a world of {size} ranks")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        with _without_the_others(rank):
            yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()


@contextmanager
def _without_the_others(rank: int) -> Iterator[None]:
    """Let torch make what is this rank's alone: of 100,000 ranks it would make every group and every empty piece."""
    new_group, chunk = device_mesh.new_group, getattr(_fsdp_param, "_chunk_with_empty", None)

    def group_of_mine(ranks: Sequence[int] | None = None, *args: Any, **kwargs: Any) -> Any:
        if ranks is not None and rank not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
        return new_group(ranks, *args, **kwargs)

    def one_empty_piece(tensor: Tensor, num_chunks: int, dim: int) -> list[Tensor]:
        chunks = list(tensor.chunk(num_chunks, dim))
        return chunks + [chunks[0].new_empty(0)] * (num_chunks - len(chunks))

    device_mesh.new_group = group_of_mine
    if chunk is not None:
        _fsdp_param._chunk_with_empty = one_empty_piece
    try:
        yield
    finally:
        device_mesh.new_group = new_group
        if chunk is not None:
            _fsdp_param._chunk_with_empty = chunk
