"""`benchmark kernels`: forward and backward of the recurrences, every backend in a process of its own.

Milliseconds beside the operator's budget at the rates of a large product and a large copy in the same process; seconds
of the first call, which compiles and tunes; how far the output is from the definition's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from torchlinearmoe.benchmark.contest import run_contestant, show
from torchlinearmoe.benchmark.kernel_calls import OPERATORS
from torchlinearmoe.benchmark.parts import parse_shape
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.kernels.choose import decide, this_machine
from torchlinearmoe.kernels.operator import Call, operators

ONE = "torchlinearmoe.benchmark.kernels_one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    parser.add_argument(
        "--operators",
        nargs="+",
        default=list(OPERATORS),
        help=f"NAME or NAME:KIND of {', '.join(OPERATORS)} (default: all, every kind)",
    )
    parser.add_argument("--backends", nargs="+", help="names (default: all that compute a call here)")
    parser.add_argument("--shape", default="1x131072", help="SEQUENCESxLENGTH (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="of a head (default: %(default)s)")
    parser.add_argument("--eager", action="store_true", help="plain PyTorch without torch.compile")
    parser.add_argument("--repeats", type=int, default=10, help="calls a figure (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds a backend (default: %(default)s)")


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Time all and print their table; 1 when nothing was timed."""
    if overrides:
        raise RecipeError(f"{overrides[0]}: kernels have no recipe; see --help")
    sequences, length = parse_shape(arguments.shape)
    for name in ("repeats", "heads", "width"):
        if getattr(arguments, name) < (least := 3 if name == "repeats" else 1):
            raise RecipeError(f"--{name} {getattr(arguments, name)}: must be at least {least}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows: list[dict[str, Any]] = []
    for operator, kind in (pair for name in arguments.operators for pair in _calls(name)):
        backends = operators()[operator].find_backends()
        names = arguments.backends or [
            name for name, b in backends.items() if not b.single and kind in b.kinds and name != "reference"
        ]
        for name in names:
            row: dict[str, Any] = {"operator": operators()[operator].label(kind), "backend": name}
            fused = name in backends and backends[name].fused and not arguments.eager
            chosen, reason = decide(
                operators()[operator], name, Call(kind, device, dtype, arguments.width), this_machine()
            )
            options = {
                "operator": operator,
                "kind": kind,
                "backend": name,
                "compile": fused,
                "lengths": [length] * sequences,
                "heads": arguments.heads,
                "width": arguments.width,
                "repeats": arguments.repeats,
            }
            if not chosen and not arguments.backends:
                print(reason, flush=True)
                continue
            row |= run_contestant(ONE, options, arguments.timeout) if chosen else {"error": reason}
            rows.append(row)
            print(row, flush=True)
    show(f"kernels, {arguments.shape}, {arguments.heads} heads of {arguments.width}, {device}", rows)
    return 0 if any("ms" in row for row in rows) else 1


def _calls(name: str) -> list[tuple[str, str]]:
    operator, _, kind = name.partition(":")
    if operator not in OPERATORS:
        raise RecipeError(f"--operators {name}: legal: {', '.join(OPERATORS)}")
    kinds = operators()[operator].kinds
    if kind and kind not in kinds:
        raise RecipeError(f"--operators {name}: legal: {', '.join(f'{operator}:{k}' for k in kinds)}")
    return [(operator, k) for k in ([kind] if kind else kinds)]
