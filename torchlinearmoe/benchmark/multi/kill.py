"""A rank killed in the middle of training: torchrun starts all of them again, and they go on from the last checkpoint.

    torchrun --max-restarts=1 -m torchlinearmoe.train RECIPE      SIGKILL for the last rank, between two checkpoints

The losses from there on are those of a run that nobody killed. Where ranks wait for a dead one in NCCL, torchrun takes
half a minute to end them.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchlinearmoe.benchmark.multi.host import POLL, Host, Job, OutOfTime, failure, read_lines
from torchlinearmoe.benchmark.multi.models import small
from torchlinearmoe.benchmark.multi.rows import Row, compared, failed
from torchlinearmoe.recipe import dump, resolve

LIMIT = 180
INTERVAL = 10
"""Steps between checkpoints."""


def run(host: Host) -> Iterator[Row]:
    """One row."""
    steps = 4 * INTERVAL if not host.cuda else 12 * INTERVAL
    parallel = {"data_shard": host.ranks}
    (whole,) = host.measure([{"kind": "train", "recipe": small(host, steps=steps, parallel=parallel)}])
    folder = host.new_folder()
    training = {"output_dir": str(folder / "run")}
    recipe = small(host, steps=steps, training=training, checkpoint={"interval": INTERVAL}, parallel=parallel)
    (folder / "recipe.toml").write_text(dump(resolve(recipe)))
    yield _killed(host, folder, whole, steps)


def _killed(host: Host, folder: Path, whole: dict[str, Any], steps: int) -> Row:
    case = "a rank killed"
    if "error" in whole:
        return failed(case, f"the run that nobody kills: {whole['error']}")
    metrics = folder / "run" / "metrics.jsonl"
    arguments = ["-m", "torchlinearmoe.train", str(folder / "recipe.toml")]
    with host.torchrun(arguments, host.ranks, folder, restarts=1) as job:
        if not _reaches(job, metrics, INTERVAL + INTERVAL // 2, host.deadline):
            return failed(case, f"ended before it was killed: {failure(folder, job.process.returncode)}")
        ranks = job.workers()
        os.kill(ranks[-1], signal.SIGKILL)
        began = time.monotonic()
        status = job.wait(host.deadline)
    if status:
        return failed(case, f"was not started again: {failure(folder, status)}")
    found = re.search(r"resumed from .* after step (\d+)", (folder / "log").read_text(errors="replace"))
    if found is None:
        return failed(case, "was started again, and not from a checkpoint")
    resumed = int(found[1])
    lines = [line for line in read_lines(metrics) if "loss" in line]
    if [line["step"] for line in lines] != list(range(1, steps + 1)):
        return failed(case, f"metrics.jsonl has {len(lines)} steps, not 1 to {steps}")
    # So far rounding alone cannot carry two runs apart.
    near = slice(resumed, resumed + INTERVAL)
    figures = {"losses": [line["loss"] for line in lines[near]], "grad_norms": [x["grad_norm"] for x in lines[near]]}
    expected = {key: whole[key][: near.stop] for key in figures}
    row = compared(case, figures, expected, host.cuda, start=resumed)
    return row | {"note": f"went on from step {resumed}, {time.monotonic() - began:.0f} s to the end"}


def _reaches(job: Job, metrics: Path, steps: int, deadline: float) -> bool:
    """Whether the run has logged `steps` steps before it ends; raises OutOfTime."""
    while job.process.poll() is None:
        with suppress(OSError):
            if metrics.read_text().count("\n") >= steps:
                return True
        if time.monotonic() > deadline:
            raise OutOfTime
        time.sleep(POLL)
    return False
