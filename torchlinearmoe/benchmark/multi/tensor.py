"""Tensor parallelism over all ranks: losses of one rank, and speed."""

from __future__ import annotations

from collections.abc import Iterator

from torchlinearmoe.benchmark.multi.host import Host, Runs
from torchlinearmoe.benchmark.multi.models import small, timed
from torchlinearmoe.benchmark.multi.rows import Row, compared, rated
from torchlinearmoe.benchmark.multi.shapes import batch_of, steps_of

LIMIT = 150


def runs(host: Host) -> Runs:
    """The ranks share one batch, as large as all of theirs together."""
    sequences, length = batch_of(host)
    split = {"data_shard": 1, "tensor": host.ranks}
    recipe = timed(host, length=length, sequences=sequences * host.ranks, parallel=split)
    every = [
        {"kind": "losses", "recipe": small(host, parallel=split)},
        {"kind": "speed", "recipe": recipe, "steps": steps_of(host)},
    ]
    return Runs([{"kind": "losses", "recipe": small(host)}], every)


def run(host: Host) -> Iterator[Row]:
    """Losses and speed."""
    wanted = runs(host)
    (alone,) = host.measure(wanted.one, 1)
    losses, speed = host.measure(wanted.every)
    yield compared("tensor", losses, alone, host.cuda)
    yield rated("tensor, speed", speed)
