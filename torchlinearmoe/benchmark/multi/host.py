"""One host: starts torchrun on some of its ranks, gives it until a deadline, and leaves no process behind.

The launcher itself never touches a GPU or a process group, so whatever becomes of a section's processes, hung, killed
or out of memory, is a result to it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

JOB = "torchlinearmoe.benchmark.multi.job"
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "TORCH_NCCL_ASYNC")
"""How the variables begin that a launcher around this one has set."""
POLL = 0.02


class OutOfTime(Exception):
    """A section's deadline is over."""


@dataclass
class Host:
    """Where the sections run, and how large."""

    ranks: int
    cuda: bool
    quick: bool
    compiled: bool
    folder: Path
    """Everything that the runs write."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Recipe keys of the models that are timed, as nested tables."""
    chip: str = ""
    """Name of the device, as the first job tells it."""
    deadline: float = float("inf")
    """Of the section under way, in time.monotonic()."""

    def __post_init__(self) -> None:
        self.number = count()
        self.known: dict[str, dict[str, Any]] = {}
        """What one rank found, by run."""

    def measure(
        self, runs: Sequence[dict[str, Any]], ranks: int | None = None, *, rising: bool = False
    ) -> list[dict[str, Any]]:
        """The figures of each run on `ranks` (default: all), or {"error": one line}.

        They share their processes until one fails; the next ones get new processes, or where they are `rising` in what
        they need, none. What one rank alone finds is kept.
        """
        if ranks != 1:
            return self._measure(runs, ranks or self.ranks, rising)
        keys = [json.dumps(run, sort_keys=True) for run in runs]
        missing = [index for index, key in enumerate(keys) if key not in self.known]
        found = dict(zip(missing, self._measure([runs[index] for index in missing], 1)))
        self.known |= {keys[index]: figures for index, figures in found.items() if "error" not in figures}
        return [found[index] if index in found else self.known[key] for index, key in enumerate(keys)]

    def _measure(self, runs: Sequence[dict[str, Any]], ranks: int, rising: bool = False) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while len(found) < len(runs):
            folder = self.new_folder()
            placed = [{**run, "folder": str(folder / str(index))} for index, run in enumerate(runs[len(found) :])]
            (folder / "runs.json").write_text(json.dumps(placed))
            try:
                with self.torchrun(["-m", JOB, str(folder)], ranks, folder) as job:
                    status = job.wait(self.deadline)
                error = failure(folder, status)
            except OutOfTime:
                error = "no answer within the limit"
            about, *answers = read_lines(folder / "answers.jsonl") or [{}]
            self.chip = self.chip or about.get("chip", "")
            found += answers
            if len(found) < len(runs):
                found.append({"error": error})
                late = time.monotonic() > self.deadline
                if late or rising:
                    why = "not begun within the limit" if late else "not begun"
                    found += [{"error": why}] * (len(runs) - len(found))
        return found

    def new_folder(self) -> Path:
        """An empty one."""
        folder = self.folder / str(next(self.number))
        folder.mkdir(parents=True)
        return folder

    @contextmanager
    def torchrun(self, arguments: Sequence[str], ranks: int, folder: Path, restarts: int = 0) -> Iterator[Job]:
        """A running torchrun of this host; what it says goes into folder/log. It and all it started end with the
        block."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        command += [f"--nproc_per_node={ranks}", f"--max-restarts={restarts}", *arguments]
        log = folder / "log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                command, env=self.environment(), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
        job = Job(process, log)
        try:
            yield job
        finally:
            job.end()

    def environment(self) -> dict[str, str]:
        """What a process of a section is started with."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
        kept |= {"NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        if not self.cuda:
            kept |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        return kept


@dataclass
class Job:
    """A torchrun that runs, or has."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait(self, deadline: float) -> int:
        """Its exit status; raises OutOfTime."""
        while (status := self.process.poll()) is None:
            if time.monotonic() > deadline:
                raise OutOfTime
            time.sleep(POLL)
        return status

    def workers(self) -> list[int]:
        """Process ids of the ranks, in the order of their start."""
        return children(self.process.pid)

    def end(self) -> None:
        """SIGKILL for it and everything below it: torchrun's ranks are in sessions of their own."""
        if self.process.poll() is None:
            below = descendants(self.process.pid)
            for pid in [self.process.pid, *below]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()


def children(pid: int) -> list[int]:
    """Ids of the processes that process `pid` has started and that still run."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, task.read_text().split())
    return sorted(found)


def descendants(pid: int) -> list[int]:
    """Those and theirs."""
    return [found for child in children(pid) for found in (child, *descendants(child))]


def failure(folder: Path, status: int) -> str:
    """Why a job ended with `status`, in a line: what the first rank that failed said, else the log's last error."""
    told = sorted(folder.glob("error-*.json"), key=lambda path: path.stat().st_mtime_ns)
    if told:
        return json.loads(told[0].read_text())
    lines = [line.strip() for line in (folder / "log").read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and "ChildFailedError" not in line]
    return (errors or lines or ["no word"])[-1][:300] + f" (exit status {status})"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file of JSON lines; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
