"""FSDP2 over all ranks, and with replicas (HSDP) from four ranks on: losses and speed of one rank alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchlinearmoe.benchmark.multi.host import Host
from torchlinearmoe.benchmark.multi.models import small, timed
from torchlinearmoe.benchmark.multi.rows import Row, compared, left_out, rated
from torchlinearmoe.benchmark.multi.shapes import batch_of, steps_of

LIMIT = 240


def run(host: Host) -> Iterator[Row]:
    """A row of losses and one of speed for each."""
    sequences, length = batch_of(host)
    shape: dict[str, Any] = {"length": length, "sequences": sequences}
    alone, alone_speed = host.measure(
        [
            {"kind": "losses", "recipe": small(host)},
            {"kind": "speed", "recipe": timed(host, **shape, parallel={"data_shard": 1}), "steps": steps_of(host)},
        ],
        ranks=1,
    )
    yield rated("one rank", alone_speed)
    layouts = {"fsdp": {"data_shard": host.ranks}}
    if host.ranks >= 4:
        layouts["hsdp"] = {"data_replicate": 2, "data_shard": host.ranks // 2}
    runs = []
    for parallel in layouts.values():
        runs.append({"kind": "losses", "recipe": small(host, parallel=parallel)})
        runs.append({"kind": "speed", "recipe": timed(host, **shape, parallel=parallel), "steps": steps_of(host)})
    found = host.measure(runs)
    for name, losses, speed in zip(layouts, found[::2], found[1::2]):
        yield compared(name, losses, alone, host.cuda)
        yield rated(f"{name}, speed", speed, alone_speed, "one rank")
    if host.ranks < 4:
        yield left_out("hsdp", "needs 4 ranks")
