"""What `benchmark moe`, `loss` and `attention` share: a part of a step, by every backend that computes it here and by
plain PyTorch compiled, each in a process of its own, held to the definition and timed forward and backward.

A part's file has `part`, a call as a recipe's model makes it, and `call`, the facts that its backend is chosen by.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from torchlinearmoe.benchmark.contest import run_contestant, show
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.kernels.choose import decide, this_machine
from torchlinearmoe.kernels.operator import Budget, Call, Operator
from torchlinearmoe.recipe import load_recipe
from torchlinearmoe.recipe.schema import ModelRecipe

ONE = "torchlinearmoe.benchmark.parts_one"
PEER = "pytorch"
"""The contestant that knows nothing of this project."""
WITHOUT_GPU = 2**20
"""Channels of all tokens at most."""


@dataclass(frozen=True)
class Part:
    """One call with its inputs and its cost."""

    run: Callable[..., Tensor]
    """Takes `inputs`; returns the output."""
    inputs: tuple[Tensor, ...]
    """With gradients."""
    budget: Budget


class PartModule(Protocol):
    """A file of a part."""

    OPERATOR: Operator

    def call(self, model: ModelRecipe, device: str, dtype: torch.dtype) -> Call:
        """What a backend is chosen by."""
        ...

    def part(
        self,
        model: ModelRecipe,
        lengths: tuple[int, ...],
        contestant: str,
        compiled: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Part:
        """The part over documents of `lengths` tokens; contestant: a backend, or PEER."""
        ...


def part_module(name: str) -> PartModule:
    """The file of the part `name`."""
    return importlib.import_module(f"torchlinearmoe.benchmark.{name}")  # pyright: ignore[reportReturnType]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands' options."""
    parser.add_argument("--recipe", default="recipes/qwen2_hgrn2.toml", help="TOML recipe (default: %(default)s)")
    parser.add_argument("--shape", default="8x2048", help="SEQUENCESxLENGTH (default: %(default)s)")
    parser.add_argument("--contestants", nargs="+", help=f"backends, or {PEER} (default: all that compute it here)")
    parser.add_argument("--eager", action="store_true", help="plain PyTorch without torch.compile")
    parser.add_argument("--repeats", type=int, default=10, help="calls a figure (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds a contestant (default: %(default)s)")


def contest(name: str, arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Time all contestants of the part `name` and print their table; 1 when nothing was timed."""
    if arguments.repeats < 3:
        raise RecipeError(f"--repeats {arguments.repeats}: must be at least 3")
    sequences, length = parse_shape(arguments.shape)
    module, model = part_module(name), load_recipe(arguments.recipe, overrides).model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if device == "cpu" and sequences * length * model.hidden_size > WITHOUT_GPU:
        most = WITHOUT_GPU // model.hidden_size
        raise RecipeError(
            f"--shape {arguments.shape}: no GPU is visible; without one give at most {most} tokens of "
            f"model.hidden_size = {model.hidden_size}"
        )
    facts, backends = module.call(model, device, dtype), module.OPERATOR.find_backends()
    names = arguments.contestants or [
        *(name for name, b in backends.items() if name != "reference" and facts.kind in b.kinds),
        PEER,
    ]
    rows: list[dict[str, Any]] = []
    for contestant in names:
        chosen, reason = (contestant, "") if contestant == PEER else decide(
            module.OPERATOR, contestant, facts, this_machine()
        )  # fmt: skip
        if not chosen and not arguments.contestants:
            print(reason, flush=True)
            continue
        options = {
            "part": name,
            "contestant": contestant,
            "recipe": arguments.recipe,
            "overrides": list(overrides),
            "lengths": [length] * sequences,
            "compile": not arguments.eager,
            "repeats": arguments.repeats,
        }
        figures = run_contestant(ONE, options, arguments.timeout) if chosen else {"error": reason}
        rows.append({"contestant": contestant, **figures})
        print(rows[-1], flush=True)
    show(f"{name}, {arguments.shape}, {arguments.recipe} {' '.join(overrides)}, {device}", rows)
    return 0 if any("ms" in row for row in rows) else 1


def parse_shape(text: str) -> tuple[int, int]:
    """Sequences and tokens of each of "SEQUENCESxLENGTH"; RecipeError for anything else."""
    sequences, _, length = text.partition("x")
    if not (sequences.isdigit() and length.isdigit() and int(sequences) and int(length)):
        raise RecipeError(f"--shape {text}: a shape reads SEQUENCESxLENGTH, e.g. 8x16384")
    return int(sequences), int(length)
