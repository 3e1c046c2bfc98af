"""A checkpoint that one layout saved, resumed on others: their losses go on as those of the first would have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchlinearmoe.benchmark.multi.host import Host, Run, Runs
from torchlinearmoe.benchmark.multi.models import small
from torchlinearmoe.benchmark.multi.rows import Row, compared, failed

LIMIT = 150
STEPS, SAVED = 8, 4


def runs(host: Host) -> Runs:
    """FSDP saves, all layouts and one rank go on: `one` takes what `every` has saved."""
    saved = host.folder / "saved"
    saved.mkdir(exist_ok=True)
    resume = {"resume": f"{saved}/checkpoints/step-{SAVED}"}
    first: Run = {
        "kind": "train",
        "recipe": small(
            host,
            steps=STEPS,
            training={"output_dir": str(saved)},
            checkpoint={"interval": SAVED},
            parallel={"data_shard": host.ranks},
        ),
    }
    others = [
        {"kind": "train", "recipe": small(host, steps=STEPS, checkpoint=resume, parallel=parallel)}
        for parallel in _layouts(host).values()
    ]
    alone = {"kind": "train", "recipe": small(host, steps=STEPS, checkpoint=resume)}
    return Runs([alone], [first, *others])


def _layouts(host: Host) -> dict[str, dict[str, int]]:
    layouts = {
        "tensor": {"data_shard": 1, "tensor": host.ranks},
        "pipeline": {"data_shard": 1, "pipeline": host.ranks},
        "context": {"data_shard": 1, "context": host.ranks},
        "expert": {"data_shard": host.ranks, "expert": host.ranks},
    }
    return {"tensor": layouts["tensor"]} if host.quick else layouts


def run(host: Host) -> Iterator[Row]:
    """Tensor, pipeline, context and expert parallelism and one rank go on."""
    wanted = runs(host)
    whole, *found = host.measure(wanted.every)
    if "error" in whole:
        yield failed("saved under fsdp", whole["error"])
        return
    for name, figures in zip(_layouts(host), found):
        yield _went_on(f"fsdp, then {name}", figures, whole, host.cuda)
    (alone,) = host.measure(wanted.one, 1)
    yield _went_on("fsdp, then one rank", alone, whole, host.cuda)


def _went_on(case: str, found: dict[str, Any], whole: dict[str, Any], cuda: bool) -> Row:
    if "error" not in found and found["resumed"] != SAVED:
        return failed(case, f"went on from step {found['resumed']}, not {SAVED}")
    return compared(case, found, whole, cuda, start=SAVED)
