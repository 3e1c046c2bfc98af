"""What all commands share: a user's mistake is one line on stderr and a status, never a traceback."""

from __future__ import annotations

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

from torchlinearmoe import disk
from torchlinearmoe.errors import UserError, visible


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
