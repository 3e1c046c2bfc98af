"""A checkpoint that one layout saved, resumed on others: their losses go on as those of the first would have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchlinearmoe.benchmark.multi.host import Host
from torchlinearmoe.benchmark.multi.models import small
from torchlinearmoe.benchmark.multi.rows import Row, compared, failed

LIMIT = 150
STEPS, SAVED = 8, 4


def run(host: Host) -> Iterator[Row]:
    """FSDP saves; tensor, pipeline, context and expert parallelism and one rank go on."""
    saved = str(host.new_folder())
    resume = {"resume": f"{saved}/checkpoints/step-{SAVED}"}
    first: dict[str, Any] = {
        "kind": "train",
        "recipe": small(
            host,
            steps=STEPS,
            training={"output_dir": saved},
            checkpoint={"interval": SAVED},
            parallel={"data_shard": host.ranks},
        ),
    }
    layouts = {
        "tensor": {"data_shard": 1, "tensor": host.ranks},
        "pipeline": {"data_shard": 1, "pipeline": host.ranks},
        "context": {"data_shard": 1, "context": host.ranks},
        "expert": {"data_shard": host.ranks, "expert": host.ranks},
    }
    if host.quick:
        layouts = {"tensor": layouts["tensor"]}
    others = [
        {"kind": "train", "recipe": small(host, steps=STEPS, checkpoint=resume, parallel=parallel)}
        for parallel in layouts.values()
    ]
    whole, *found = host.measure([first, *others])
    if "error" in whole:
        yield failed("saved under fsdp", whole["error"])
        return
    for name, figures in zip(layouts, found):
        yield _went_on(f"fsdp, then {name}", figures, whole, host.cuda)
    (alone,) = host.measure([{"kind": "train", "recipe": small(host, steps=STEPS, checkpoint=resume)}], ranks=1)
    yield _went_on("fsdp, then one rank", alone, whole, host.cuda)


def _went_on(case: str, found: dict[str, Any], whole: dict[str, Any], cuda: bool) -> Row:
    if "error" not in found and found["resumed"] != SAVED:
        return failed(case, f"went on from step {found['resumed']}, not {SAVED}")
    return compared(case, found, whole, cuda, start=SAVED)
