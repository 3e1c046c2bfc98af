"""What all commands share: a user's mistake is one line on stderr and a status, never a traceback."""

from __future__ import annotations

import argparse
import io
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from torchlinearmoe import disk
from torchlinearmoe.errors import UserError, visible

if TYPE_CHECKING:
    import torch


class Failure(Exception):
    """A run that ended badly for a reason that one line tells."""


@contextmanager
def failures_on_one_line() -> Iterator[None]:
    """Turn a user's mistake into one line on stderr and exit status 1; anything else keeps its traceback.

    Ctrl-C ends with its status and no word, and so does a pipe whose reader has ended (`| head`).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is spelled out
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        if not isinstance(error, (UserError, Failure)):
            found = disk.refusal(error)
            if found is None:
                raise
            error = UserError(disk.told(found))
        if os.environ.get("RANK", "0") != "0":
            # Rank 0 most likely says the same, and its end is this rank's end: let it speak first.
            time.sleep(10)
        line = f"error: {visible(' '.join(str(error).split()))}"
        print(line, file=sys.stderr, flush=True)
        _tell_launcher(line)
        sys.exit(1)


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # no descriptor, as under a test's capture
        return False


def _tell_launcher(line: str) -> None:
    """Leave the line to torchrun, which says it last: after a page about its own stack."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": line, "timestamp": str(int(time.time()))}))


@contextmanager
def progress_bar(verb: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, on a terminal only; call what it gives with (done, total)."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """`--device` and `--dtype`, which `device_and_dtype` reads."""
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU when there is one")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on a GPU")


def device_and_dtype(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """What the options of `add_device_options` mean here. Raises Failure where there is no such device."""
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise Failure("--device cuda: no GPU is visible; use cpu or auto")
    cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    if options.dtype == "auto":
        dtype = torch.bfloat16 if cuda else torch.float32
    else:
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[options.dtype]
    return torch.device("cuda" if cuda else "cpu"), dtype


SILENT_SECONDS = 30
"""Between two lines of progress where there is no terminal."""


@contextmanager
def bytes_bar(verb: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with MB/s and the time left; call what it gives with (done, total) in bytes.

    Where stderr is no terminal it is a line now and then. What is done at the first call was done before.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    begun = last = 0.0
    before: int | None = None

    def tell(done: int, total: int) -> None:
        nonlocal before, begun, last
        now = time.monotonic()
        if before is None:
            before, begun, last = done, now, now
        if now - last < (0.2 if console.is_terminal else SILENT_SECONDS) and done < total:
            return
        last = now
        figures = pace(done - before, done, total, now - begun)
        if console.is_terminal:
            if not bar.tasks:
                bar.add_task(verb, figures="")
            bar.update(bar.tasks[0].id, completed=done, total=total, figures=figures)
        elif done < total:
            print(f"{verb}: {figures}", file=sys.stderr, flush=True)

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}")
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield tell


def pace(now: int, done: int, total: int, seconds: float) -> str:
    """How far work on `total` bytes has come, and how long it will take as it went in the last `seconds`, for `now`.

    >>> pace(20_000_000, 50_000_000, 200_000_000, 10)
    '50 of 200 MB, 2.0 MB/s, 1:15 left'
    """
    rate = now / max(seconds, 1e-9)
    left = f", {_clock((total - done) / rate)} left" if rate else ""
    return f"{done / 1e6:.0f} of {total / 1e6:.0f} MB, {rate / 1e6:.1f} MB/s{left}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
