"""Real processes for tests: the train command alone or under torchrun, and what is needed to kill it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torchlinearmoe.recipe import dump, resolve

ROOT = Path(__file__).parents[2]
SLOW_SAVE = str(Path(__file__).with_name("slow_save.py"))
TRAIN = ("-m", "torchlinearmoe.train")


def write_recipe(tables: dict, path: Path) -> Path:
    """The recipe of these tables as a file."""
    path.write_text(dump(resolve(tables)))
    return path


class Job:
    """A running command."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log

    def workers(self) -> list[int]:
        """Ids of the processes that the command started."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def wait_for(self, happened: Callable[[], bool], seconds: float = 90) -> None:
        """Return as soon as `happened()`."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"waited {seconds} s:\n{self.log.read_text()}"
            time.sleep(0.005)

    def kill(self) -> None:
        """SIGKILL for the command and the workers it started, which are in sessions of their own."""
        if self.process.poll() is None:
            for pid in [self.process.pid, *self.workers()]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def status(self, seconds: float = 60) -> int:
        """The exit status, once the command has ended."""
        return self.process.wait(seconds)


@contextmanager
def job(log: Path, *arguments: str, ranks: int = 0, restarts: int = 0, gpus: bool = False) -> Iterator[Job]:
    """`python ARGUMENTS`, or `torchrun ARGUMENTS` with `ranks`; killed on the way out if it still runs.

    restarts: how often torchrun starts its ranks again when one of them fails.
    """
    command = [sys.executable]
    if ranks:
        command += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
            f"--max-restarts={restarts}",
        ]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    if not gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, *arguments],
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    running = Job(process, log)
    try:
        yield running
    finally:
        running.kill()


def steps_logged(folder: Path) -> int:
    """Lines of metrics.jsonl so far."""
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0
