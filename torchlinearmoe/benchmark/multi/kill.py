"""A rank killed in the middle of training: torchrun starts all of them again, and they go on from the last checkpoint.

    torchrun --max-restarts=1 -m torchlinearmoe.train RECIPE      SIGKILL for the last rank, between two checkpoints

The losses from there on are those of a run that nobody killed. Where ranks wait for a dead one in NCCL, torchrun takes
half a minute to end them, which `--quick` spares it: it kills them too, a second later.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from torchlinearmoe.benchmark.multi.host import (
    LATE,
    POLL,
    Figures,
    Host,
    Job,
    OutOfTime,
    Runs,
    failure,
    read_lines,
)
from torchlinearmoe.benchmark.multi.models import small
from torchlinearmoe.benchmark.multi.rows import Row, compared, failed
from torchlinearmoe.recipe import dump, resolve

LIMIT = 180
INTERVAL = 10
"""Steps between checkpoints."""


def runs(host: Host) -> Runs:
    """The run that nobody kills, and the other."""
    whole = {"kind": "train", "recipe": small(host, steps=_steps(host), parallel={"data_shard": host.ranks})}
    return Runs(every=[whole], apart=lambda deadline: _train_and_kill(host, deadline))


def _steps(host: Host) -> int:
    return 4 * INTERVAL if host.quick or not host.cuda else 12 * INTERVAL


def run(host: Host) -> Iterator[Row]:
    """One row."""
    case, wanted = "a rank killed", runs(host)
    (whole,) = host.measure(wanted.every)
    if "error" in whole:
        yield failed(case, f"the run that nobody kills: {whole['error']}")
        return
    assert wanted.apart is not None
    killed = host.once("kill", wanted.apart, host.deadline)
    if "error" in killed:
        yield failed(case, killed["error"])
        return
    # So far rounding alone cannot carry two runs apart.
    near = slice(killed["resumed"], killed["resumed"] + INTERVAL)
    figures = {key: killed[key][near] for key in ("losses", "grad_norms")}
    expected = {key: whole[key][: near.stop] for key in figures}
    yield compared(case, figures, expected, host.cuda, start=killed["resumed"]) | {"note": killed["note"]}


def _train_and_kill(host: Host, deadline: float) -> Figures:
    """Losses of all steps, the step it went on from, and a note; else why there are none."""
    folder, steps = host.new_folder(), _steps(host)
    training, parallel = {"output_dir": str(folder / "run")}, {"data_shard": host.ranks}
    recipe = small(host, steps=steps, training=training, checkpoint={"interval": INTERVAL}, parallel=parallel)
    (folder / "recipe.toml").write_text(dump(resolve(recipe)))
    metrics = folder / "run" / "metrics.jsonl"
    arguments = ["-m", "torchlinearmoe.train", str(folder / "recipe.toml")]
    try:
        with host.torchrun(arguments, host.ranks, folder, restarts=1) as job:
            if not _reaches(job, metrics, INTERVAL + INTERVAL // 2, deadline, host.check):
                return {"error": f"ended before it was killed: {failure(folder, job.process.returncode)}"}
            began = time.monotonic()
            _kill(job, all_of_them=host.quick)
            status = job.wait(deadline, host.check)
    except OutOfTime:
        return {"error": f"no answer {LATE}"}
    if status:
        return {"error": f"was not started again: {failure(folder, status)}"}
    found = re.search(r"resumed from .* after step (\d+)", (folder / "log").read_text(errors="replace"))
    if found is None:
        return {"error": "was started again, and not from a checkpoint"}
    lines = [line for line in read_lines(metrics) if "loss" in line]
    if [line["step"] for line in lines] != list(range(1, steps + 1)):
        return {"error": f"metrics.jsonl has {len(lines)} steps, not 1 to {steps}"}
    return {
        "resumed": int(found[1]),
        "losses": [line["loss"] for line in lines],
        "grad_norms": [line["grad_norm"] for line in lines],
        "note": f"went on from step {found[1]}, {time.monotonic() - began:.0f} s to the end",
    }


def _kill(job: Job, all_of_them: bool) -> None:
    """The last rank; then those that are still there, or leave them to torchrun."""
    *others, last = job.workers()
    os.kill(last, signal.SIGKILL)
    if all_of_them:
        time.sleep(1)
        for pid in set(others) & set(job.workers()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _reaches(job: Job, metrics: Path, steps: int, deadline: float, check: Callable[[], None]) -> bool:
    """Whether the run has logged `steps` steps before it ends; raises OutOfTime."""
    while job.process.poll() is None:
        with suppress(OSError):
            if metrics.read_text().count("\n") >= steps:
                return True
        if time.monotonic() > deadline:
            raise OutOfTime
        check()
        time.sleep(POLL)
    return False
