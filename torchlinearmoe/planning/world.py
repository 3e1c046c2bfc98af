"""A world of any size in one process: its process group moves nothing, its model holds nothing.

The meshes, the sharding and the optimizer are those of training, so a layout that cannot be built is refused here in
the same words.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

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
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()
