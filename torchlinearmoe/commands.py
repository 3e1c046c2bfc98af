"""What all commands share: a user's mistake is one line on stderr and a status, never a traceback."""

from __future__ import annotations

import argparse
import io
import json
import os
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

    Ctrl-C ends with its status and no word.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is spelled out
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
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
