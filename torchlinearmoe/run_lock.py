"""One run at a time in a folder: `training.output_dir/run.lock` names the process that writes there.

    no file, or an empty one                   taken
    owner on this host, dead                   taken over, with a line
    owner of this launch, before a restart     taken over: torchrun and Slurm start again, perhaps elsewhere
    owner on this host, alive                  refused
    owner on another host                      refused, with the file to remove: its process cannot be seen from here

A process is told from a later one of the same id by when it started.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch.distributed as dist

from torchlinearmoe.checkpoint.folder import clear
from torchlinearmoe.disk import FULL
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.processes import is_alive, started
from torchlinearmoe.runtime import on_rank_0

logger = logging.getLogger(__name__)

T = TypeVar("T")
LOCK_FILE = "run.lock"


@dataclass(frozen=True)
class Owner:
    """The process of rank 0."""

    host: str
    pid: int
    started: int | None
    """In clock ticks after the host's start; None where that cannot be known."""
    launch: str
    """torchrun's id of this launch; empty without one."""
    attempt: list[int]
    """How often Slurm has started the job again, and torchrun its ranks."""

    @classmethod
    def here(cls) -> Owner:
        """This process."""
        launch = os.environ.get("TORCHELASTIC_RUN_ID", "")
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=started(os.getpid()),
            launch="" if launch == "none" else launch,  # the default, which all launches share
            attempt=[int(os.environ.get(f"{name}_RESTART_COUNT", "0")) for name in ("SLURM", "TORCHELASTIC")],
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder on rank 0, made where there is none; every rank enters and leaves.

    SIGTERM ends the block with exit status 143 until somebody else handles it. Raises RecipeError on all ranks when
    another run holds the folder, UserError when it cannot be written.
    """
    own = Owner.here()
    with _ending_on_sigterm():  # before there is a lock that it would leave behind
        try:
            on_rank_0(lambda: take(folder, own))
            yield
        finally:
            if dist.get_rank() == 0:
                release(folder, own)


def take(folder: Path, own: Owner) -> None:
    """Make `own` the owner of `folder`. Raises RecipeError, one line, when it has another."""
    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(path) as descriptor:
            before = _read(path, os.pread(descriptor, 2**16, 0))
            if before is not None:
                _check(folder, before, own)
                logger.warning("%s: %s ended without releasing it; taken over", path, before)
            _with_room(folder, lambda: _write(descriptor, own))
    except OSError as error:
        raise RecipeError(
            f"training.output_dir = '{folder}': cannot write {path}: {error.strerror}; make room, or choose another"
        ) from None


def _write(descriptor: int, own: Owner) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(asdict(own)).encode(), 0)
    os.fsync(descriptor)


def _with_room(folder: Path, action: Callable[[], T]) -> T:
    """Do it, on a full disk once more without what a killed run left half written; nobody else writes the folder."""
    try:
        return action()
    except OSError as error:
        if error.errno not in FULL:
            raise
        clear(folder / "checkpoints")
        return action()


def release(folder: Path, own: Owner) -> None:
    """Give `folder` back, unless it has another owner by now."""
    path = folder / LOCK_FILE
    with suppress(OSError, RecipeError), _alone(path) as descriptor:
        if _read(path, os.pread(descriptor, 2**16, 0)) == own:
            path.unlink()


@contextmanager
def _alone(path: Path) -> Iterator[int]:
    """The open lock file, while no other process is between its first look at it and its last word."""
    while True:
        descriptor = _with_room(path.parent, lambda: os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644))
        try:
            with suppress(OSError):  # a file system without such locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not path.exists() or path.stat().st_ino != os.fstat(descriptor).st_ino:
                continue  # released in the meantime
            yield descriptor
            return
        finally:
            os.close(descriptor)


def _read(path: Path, content: bytes) -> Owner | None:
    if not content:
        return None
    try:
        owner = Owner(**json.loads(content))
        if type(owner.pid) is not int or not isinstance(owner.attempt, list):
            raise TypeError("pid must be a number, attempt a list")
        return owner
    except (ValueError, TypeError):
        raise RecipeError(f"training.output_dir: {path} is not what a run writes; remove it") from None


def _check(folder: Path, before: Owner, own: Owner) -> None:
    """Raise RecipeError unless `before` is gone for certain."""
    if before.launch and before.launch == own.launch and before.attempt < own.attempt:
        return
    told = f"training.output_dir = '{folder}': another run writes there ({before})"
    if before.host != own.host:
        raise RecipeError(
            f"{told}; if it is no longer alive, remove {folder / LOCK_FILE}, else choose another training.output_dir"
        )
    if _holds(before):
        raise RecipeError(f"{told}; wait for its end or choose another training.output_dir")


def _holds(owner: Owner) -> bool:
    """Whether a process of this host still runs, and is not a later one of the same id."""
    return is_alive(owner.pid) and (owner.started is None or started(owner.pid) in (None, owner.started))


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack, as Ctrl-C does."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
