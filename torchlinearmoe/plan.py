"""The command: `python -m torchlinearmoe.plan RECIPE [--world-size N ...] [--section.key=value ...]`.

With several numbers of ranks, or with lengths, it compares layouts; see `planning/choice.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torchlinearmoe.commands import Failure, failures_on_one_line, progress_bar

if TYPE_CHECKING:
    import torch

    from torchlinearmoe.recipe import Recipe

CHOOSING = ("sequence_length", "memory", "tflops", "network")
"""Options with which layouts are compared."""
MEMORIES = (80.0, 141.0)
"""GiB of an H100 and an H200."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Tell what a recipe costs without training it; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m torchlinearmoe.plan",
        description="Tell what a recipe costs on any number of ranks: parameters, FLOPs, memory, communication. "
        "Trains nothing and allocates no weights. With several numbers of ranks, or any of the options from "
        "--sequence-length on, it looks for the fastest layout that fits each of them: for context, expert and "
        "tensor of [parallel] and training.activation_checkpointing, but for what the command line says of these.",
        epilog="Any recipe key can be given as --section.key=value.",
    )
    parser.add_argument("recipe", help="TOML file, e.g. recipes/qwen2_hgrn2.toml")
    parser.add_argument(
        "--world-size", type=int, nargs="+", metavar="N", help="ranks (default: what the recipe's degrees make)"
    )
    parser.add_argument("--rank", type=int, metavar="R", help="whose memory to show (default 0)")
    parser.add_argument("--json", action="store_true", help="write one JSON object, sizes in bytes")
    parser.add_argument("--sequence-length", type=int, nargs="+", metavar="T", help="tokens of a sequence")
    parser.add_argument("--memory", type=float, nargs="+", metavar="GIB", help="of a GPU, to fit into (80 141)")
    parser.add_argument("--tflops", type=float, metavar="F", help="of a GPU over a step, to estimate seconds (400)")
    parser.add_argument("--network", type=float, metavar="GB", help="GB/s of a GPU to other nodes, likewise (40)")
    known, overrides = parser.parse_known_args(_recipe_first(sys.argv[1:] if arguments is None else arguments))
    with failures_on_one_line():
        return _plan(known, overrides)


def _recipe_first(arguments: Sequence[str]) -> list[str]:
    """The recipe before the options, whose lists would take it for one of their numbers."""
    recipes = [argument for argument in arguments if argument.endswith(".toml") and not argument.startswith("-")]
    return [*recipes[:1], *(argument for argument in arguments if argument not in recipes[:1])]


def _plan(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from torchlinearmoe.planning import plan
    from torchlinearmoe.planning.report import print_plan
    from torchlinearmoe.recipe import load_recipe

    for name in ("world_size", *CHOOSING):
        given = getattr(options, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not value > 0:
                least = "above 0" if isinstance(value, float) else "at least 1"
                raise Failure(f"--{name.replace('_', '-')} {value}: must be {least}")
    if len(options.world_size or ()) > 1 or any(getattr(options, name) for name in CHOOSING):
        return _choose(options, overrides)
    recipe = load_recipe(options.recipe, overrides)
    world_size = options.world_size[0] if options.world_size else _natural_world(recipe)
    with progress_bar(f"laying out ranks of {world_size}") as progress:
        found = plan(recipe, world_size, _dtype(recipe), options.rank or 0, progress)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print_plan(found, sys.stdout)
    return 0


def _choose(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """The fastest layouts."""
    from torchlinearmoe.planning import Machine, choose_layouts
    from torchlinearmoe.planning.choice import left_open
    from torchlinearmoe.planning.report import print_choice
    from torchlinearmoe.recipe import load_recipe

    if options.rank is not None:
        raise Failure(f"--rank {options.rank}: where layouts are compared, the rank that holds most is told")
    rates = {"flops": (options.tflops, 1e12), "network_bytes": (options.network, 1e9)}
    machine = Machine(**{name: value * unit for name, (value, unit) in rates.items() if value is not None})
    fixed = {override.removeprefix("--").partition("=")[0] for override in overrides}
    recipe = load_recipe(options.recipe, [*overrides, *left_open(fixed)])
    worlds = options.world_size or [_natural_world(load_recipe(options.recipe, overrides))]
    lengths = options.sequence_length or [recipe.training.sequence_length]
    with progress_bar("comparing layouts") as progress:
        rows = choose_layouts(
            lambda more: load_recipe(options.recipe, [*overrides, *more]),
            fixed,
            worlds,
            lengths,
            options.memory or MEMORIES,
            _dtype(recipe),
            machine,
            progress,
        )
    if options.json:
        print(json.dumps({"machine": dataclasses.asdict(machine), "cells": rows}, indent=2))
    else:
        print_choice(rows, machine, sys.stdout)
    return 0


def _natural_world(recipe: Recipe) -> int:
    """The fewest ranks that the degrees of the recipe make."""
    parallel = recipe.parallel
    return (
        parallel.pipeline * parallel.data_replicate * max(parallel.data_shard, 1) * parallel.context * parallel.tensor
    )


def _dtype(recipe: Recipe) -> torch.dtype:
    """The compute type that training would take; a device that is named need not be in this machine."""
    import torch

    from torchlinearmoe.runtime import choose_dtype

    device = recipe.training.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return choose_dtype(recipe.training, torch.device(device))


if __name__ == "__main__":
    sys.exit(main())
