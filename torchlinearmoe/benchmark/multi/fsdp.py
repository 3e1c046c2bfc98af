"""FSDP2 over all ranks, and with replicas (HSDP) from four ranks on: losses and speed of one rank alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchlinearmoe.benchmark.multi.host import Host, Run, Runs
from torchlinearmoe.benchmark.multi.models import small, timed
from torchlinearmoe.benchmark.multi.rows import Row, compared, left_out, rated
from torchlinearmoe.benchmark.multi.shapes import batch_of, steps_of

LIMIT = 240


def runs(host: Host) -> Runs:
    """Losses and speed, alone and of each layout."""
    sequences, length = batch_of(host)
    shape: dict[str, Any] = {"length": length, "sequences": sequences}

    def speed(parallel: dict[str, int]) -> Run:
        return {"kind": "speed", "recipe": timed(host, **shape, parallel=parallel), "steps": steps_of(host)}

    every = []
    for parallel in _layouts(host).values():
        every += [{"kind": "losses", "recipe": small(host, parallel=parallel)}, speed(parallel)]
    return Runs([{"kind": "losses", "recipe": small(host)}, speed({"data_shard": 1})], every)


def _layouts(host: Host) -> dict[str, dict[str, int]]:
    layouts = {"fsdp": {"data_shard": host.ranks}}
    if host.ranks >= 4:
        layouts["hsdp"] = {"data_replicate": 2, "data_shard": host.ranks // 2}
    return layouts


def run(host: Host) -> Iterator[Row]:
    """A row of losses and one of speed for each."""
    wanted = runs(host)
    alone, alone_speed = host.measure(wanted.one, 1)
    yield rated("one rank", alone_speed)
    found = host.measure(wanted.every)
    for name, losses, speed in zip(_layouts(host), found[::2], found[1::2]):
        yield compared(name, losses, alone, host.cuda)
        yield rated(f"{name}, speed", speed, alone_speed, "one rank")
    if host.ranks < 4:
        yield left_out("hsdp", "needs 4 ranks")
