"""The command: `python -m torchlinearmoe.plot RUN...`: curves of runs as PNG."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torchlinearmoe.commands import Failure, failures_on_one_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw runs and say where the pictures are; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m torchlinearmoe.plot",
        description="Draw loss, gradient norm, throughput and the load of experts of one or several runs as PNG. "
        "Several are named by what differs in their recipes. Needs the extra `plot` (matplotlib).",
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run, running or done, e.g. runs/quickstart")
    add("--x", choices=("tokens", "steps", "hours"), default="tokens", help="axis of the curves (default tokens)")
    add("--output", default="plots", metavar="FOLDER", help="where the pictures go (default plots)")
    add(
        "--smooth",
        type=int,
        default=1,
        metavar="N",
        help="running mean of N logged steps for training loss and gradient norm (default 1: as logged)",
    )
    options = parser.parse_args(arguments)
    with failures_on_one_line():
        return _plot(options)


def _plot(options: argparse.Namespace) -> int:
    from torchlinearmoe.plotting.figures import check_matplotlib, draw
    from torchlinearmoe.plotting.legend import labels
    from torchlinearmoe.plotting.run import read_run

    if options.smooth < 1:
        raise Failure(f"--smooth {options.smooth}: must be at least 1")
    check_matplotlib()
    runs = [read_run(path) for path in options.runs]
    for file in draw(runs, labels(runs), Path(options.output), options.x, options.smooth):
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
