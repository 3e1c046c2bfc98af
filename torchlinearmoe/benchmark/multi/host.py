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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

JOB = "torchlinearmoe.benchmark.multi.job"
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "TORCH_NCCL_ASYNC")
"""How the variables begin that a launcher around this one has set."""
POLL = 0.02
LATE = "within the limit"
"""How the error ends of what the deadline cut short, or left no time for."""
TURN = ("after", "says")
"""Keys of a run that say when it takes place, not what it is."""

Run = dict[str, Any]
Figures = dict[str, Any]


class OutOfTime(Exception):
    """A section's deadline is over."""


class Stuck(Exception):
    """A run says nothing for too long."""


@dataclass
class Runs:
    """What a section measures."""

    one: list[Run] = field(default_factory=list)
    """On one rank."""
    every: list[Run] = field(default_factory=list)
    """On all of them."""
    apart: Callable[[float], Figures] | None = None
    """What takes processes of its own, until a deadline."""


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
    patience: float = float("inf")
    """Seconds that a run may take, its waiting aside."""

    def __post_init__(self) -> None:
        self.number = count()
        self.known: dict[str, Figures] = {}
        """What was found, by ranks and run."""
        self.uncounted: set[str] = set()
        """Those of `known` that no section has asked for."""
        self.asked_s = 0.0
        """Seconds of those that sections have asked for since."""
        self.start_s = 0.0
        """Seconds that the slowest job took until its first run."""
        self.torchruns: list[dict[str, Any]] = []
        """The torchruns so far: ranks, and seconds from the launcher's start to their start and end."""
        self.began = time.monotonic()
        self.turns = self.new_folder()
        """Where jobs that are beside each other leave files to wait for."""

    def measure(self, runs: Sequence[Run], ranks: int | None = None, *, rising: bool = False) -> list[Figures]:
        """The figures of each run on `ranks` (default: all), or {"error": one line}.

        They share their processes until one fails; the next ones get new processes, or where they are `rising` in what
        they need, none. What is found is kept, failures too, but for those of runs that had no time.
        """
        ranks = ranks or self.ranks
        if rising:
            return list(self._each(runs, ranks, rising))
        return list(self.each(runs, ranks))

    def each(self, runs: Sequence[Run], ranks: int | None = None) -> Iterator[Figures]:
        """The same of runs that are not rising, each as it comes."""
        ranks = ranks or self.ranks
        keys = [key_of(run, ranks) for run in runs]
        unknown = [run for run, key in zip(runs, keys) if key not in self.known]
        answers = iter(self._each(unknown, ranks) if unknown else ())
        wanted = {key for key in keys if key not in self.known}
        for key in keys:
            if key not in wanted:
                yield self._recall(key)
                continue
            figures = next(answers)
            if not is_late(figures):
                self.known[key] = figures
            yield figures

    def beside(self, groups: Sequence[Sequence[Run]], seconds: float) -> None:
        """Do runs of which nobody wants the figures, each group in processes of its own, all at once, for so long."""
        deadline, self.deadline = self.deadline, min(self.deadline, time.monotonic() + seconds)
        try:
            with ThreadPoolExecutor(len(groups)) as pool:
                futures = [pool.submit(self.measure, group) for group in groups]
                with self.ending():
                    wait(futures)  # a run that fails will do so again, and tell
        finally:
            self.deadline = deadline

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Let no job outlive what is raised inside, by a signal perhaps."""
        try:
            yield
        except BaseException:
            self.deadline = time.monotonic()
            raise

    def once(self, name: str, find: Callable[[float], Figures], deadline: float) -> Figures:
        """What `find` finds until a deadline, or found before."""
        if name in self.known:
            return self._recall(name)
        if time.monotonic() > min(deadline, self.deadline):
            return {"error": f"not begun {LATE}"}
        began = time.monotonic()
        figures = find(deadline)
        if not is_late(figures):
            self.known[name] = figures | {"run_s": round(time.monotonic() - began, 1)}
        return figures

    def _recall(self, key: str) -> Figures:
        if key in self.uncounted:
            self.uncounted.remove(key)
            self.asked_s += self.known[key].get("run_s", 0.0)
        return self.known[key]

    def _each(self, runs: Sequence[Run], ranks: int, rising: bool = False) -> Iterable[Figures]:
        found = 0
        while found < len(runs):
            if time.monotonic() > self.deadline:
                yield from [{"error": f"not begun {LATE}"}] * (len(runs) - found)
                return
            folder = self.new_folder()
            placed = [{**run, "folder": str(folder / str(index))} for index, run in enumerate(runs[found:])]
            (folder / "runs.json").write_text(json.dumps(placed))
            told = 0
            try:
                with self.torchrun(["-m", JOB, str(folder)], ranks, folder) as job:
                    while (status := job.process.poll()) is None:
                        self._watch(folder)
                        for figures in self._answers(folder)[told:]:
                            told += 1
                            yield figures
                        time.sleep(POLL)
                error = failure(folder, status)
            except OutOfTime:
                error = f"no answer {LATE}"
            except Stuck:
                error = f"no word for {self.patience:.0f} s"
            yield from self._answers(folder)[told:]
            found += len(self._answers(folder))
            if found < len(runs):
                found += 1
                yield {"error": error}
                if rising and time.monotonic() <= self.deadline:
                    yield from [{"error": "not begun"}] * (len(runs) - found)
                    return

    def _answers(self, folder: Path) -> list[Figures]:
        """What the job of this folder has found so far."""
        about, *answers = read_lines(folder / "answers.jsonl") or [{}]
        self.chip = self.chip or about.get("chip", "")
        self.start_s = max(self.start_s, about.get("start_s", 0.0))
        return answers

    def check(self) -> None:
        """Raise OutOfTime where the deadline is over, which may have come nearer."""
        if time.monotonic() > self.deadline:
            raise OutOfTime

    def _watch(self, folder: Path) -> None:
        """Raise OutOfTime; or Stuck, where the folder's job has begun and for too long neither answers nor waits."""
        self.check()
        answers = folder / "answers.jsonl"
        if answers.exists() and time.time() - answers.stat().st_mtime > self.patience:
            raise Stuck

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
        told = {"ranks": ranks, "starts_s": round(time.monotonic() - self.began, 1)}
        self.torchruns.append(told)
        try:
            yield job
        finally:
            job.end()
            told["ends_s"] = round(time.monotonic() - self.began, 1)

    def environment(self) -> dict[str, str]:
        """What a process of a section is started with."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
        kept |= {"NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        # Ranks, and jobs beside each other, compile at the same time.
        kept.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // (4 * self.ranks))))
        if not self.cuda:
            kept |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        return kept


@dataclass
class Job:
    """A torchrun that runs, or has."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait(self, deadline: float, watch: Callable[[], None] = lambda: None) -> int:
        """Its exit status; raises OutOfTime, and what `watch` raises, which is called again and again."""
        while (status := self.process.poll()) is None:
            if time.monotonic() > deadline:
                raise OutOfTime
            watch()
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


def key_of(run: Run, ranks: int) -> str:
    """What a run is known by."""
    return json.dumps([ranks, {name: value for name, value in run.items() if name not in TURN}], sort_keys=True)


def is_late(figures: Figures) -> bool:
    """Whether a deadline is why there are none."""
    return figures.get("error", "").endswith(LATE)


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
