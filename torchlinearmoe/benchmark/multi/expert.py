"""Expert parallelism over all ranks, all-to-all with the uneven loads that the router makes, beside experts that are
whole on each rank under FSDP."""

from __future__ import annotations

from collections.abc import Iterator

from torchlinearmoe.benchmark.multi.host import Host, Runs
from torchlinearmoe.benchmark.multi.models import small, timed
from torchlinearmoe.benchmark.multi.rows import Row, compared, rated
from torchlinearmoe.benchmark.multi.shapes import batch_of, steps_of

LIMIT = 180


def runs(host: Host) -> Runs:
    """Losses, and the speeds of both."""
    sequences, length = batch_of(host)
    spread = {"data_shard": host.ranks, "expert": host.ranks}
    speeds = [
        {
            "kind": "speed",
            "recipe": timed(host, length=length, sequences=sequences, parallel=parallel),
            "steps": steps_of(host),
        }
        for parallel in (spread, {"data_shard": host.ranks})
    ]
    every = [{"kind": "losses", "recipe": small(host, parallel=spread)}, *speeds]
    return Runs([{"kind": "losses", "recipe": small(host)}], every)


def run(host: Host) -> Iterator[Row]:
    """Losses, with the load of the fullest expert over the mean, and both speeds."""
    wanted = runs(host)
    (alone,) = host.measure(wanted.one, 1)
    losses, spread_speed, whole_speed = host.measure(wanted.every)
    yield compared("all-to-all", losses, alone, host.cuda)
    yield rated("all-to-all, speed", spread_speed, whole_speed, "experts whole")
    yield rated("experts whole, speed", whole_speed)
