"""Pipeline parallelism over all ranks, in every schedule of the recipe: losses of one rank, and speed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchlinearmoe.benchmark.multi.host import Host, Runs
from torchlinearmoe.benchmark.multi.models import small, timed
from torchlinearmoe.benchmark.multi.rows import Row, compared, rated
from torchlinearmoe.benchmark.multi.shapes import batch_of, steps_of

LIMIT = 240
SCHEDULES = ("1f1b", "interleaved", "zero_bubble")


def runs(host: Host) -> Runs:
    """Losses of all schedules first, then their speeds, eager: twice as many micro-batches as ranks."""
    sequences, length = batch_of(host)
    # Weights stay gathered, as a backward in two parts wants them; no rank has a share of others' here.
    alike = {"data_shard": 1, "pipeline": host.ranks, "reshard_after_forward": False}
    layouts = [{**alike, "pipeline_schedule": name} for name in SCHEDULES]
    # Two stages a rank want as many layers.
    layers = {"num_layers": 16} if host.ranks == 8 else {}
    shape: dict[str, Any] = {"length": length, "sequences": sequences // 2, "micro_batches": 2 * host.ranks}
    losses = [{"kind": "losses", "recipe": small(host, parallel=parallel)} for parallel in layouts]
    recipes = [timed(host, **shape, parallel=parallel, model=layers) for parallel in layouts]
    for recipe in recipes:
        recipe["training"]["compile"] = False  # a backward in two parts is not compiled: none is, to be beside it
    speeds = [{"kind": "speed", "recipe": recipe, "steps": steps_of(host)} for recipe in recipes]
    return Runs([{"kind": "losses", "recipe": small(host)}], [*losses, *speeds])


def run(host: Host) -> Iterator[Row]:
    """Rows of the losses, then of the speeds."""
    wanted = runs(host)
    (alone,) = host.measure(wanted.one, 1)
    found = host.measure(wanted.every)
    for name, figures in zip(SCHEDULES, found):
        yield compared(name, figures, alone, host.cuda)
    first, *others = found[len(SCHEDULES) :]
    yield rated(f"{SCHEDULES[0]}, speed", first)
    for name, speed in zip(SCHEDULES[1:], others):
        yield rated(f"{name}, speed", speed, first, SCHEDULES[0])
