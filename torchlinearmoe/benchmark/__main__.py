"""`python -m torchlinearmoe.benchmark COMMAND [options] [--section.key=value ...]`, for the commands of SUBCOMMANDS."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torchlinearmoe.benchmark import attention, data, kernels, loss, moe, multi, optimizer, prepare, train
from torchlinearmoe.commands import failures_on_one_line

SUBCOMMANDS = {
    "train": train,
    "kernels": kernels,
    "moe": moe,
    "loss": loss,
    "attention": attention,
    "optimizer": optimizer,
    "data": data,
    "prepare": prepare,
    "multi": multi,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m torchlinearmoe.benchmark",
        description="Measure this machine. Recipe keys can be given as --section.key=value.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, module in SUBCOMMANDS.items():
        summary = (module.__doc__ or "").strip().splitlines()[0].partition(": ")[2]
        module.add_arguments(subparsers.add_parser(name, help=summary, description=summary))
    known, overrides = parser.parse_known_args(arguments)
    with failures_on_one_line():
        return SUBCOMMANDS[known.command].run(known, overrides)


if __name__ == "__main__":
    sys.exit(main())
