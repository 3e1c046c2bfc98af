"""The command: `python -m torchlinearmoe.plan RECIPE [--world-size N] [--section.key=value ...]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torchlinearmoe.commands import Failure, failures_on_one_line, progress_bar

if TYPE_CHECKING:
    import torch

    from torchlinearmoe.recipe import Recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Tell what a recipe costs without training it; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m torchlinearmoe.plan",
        description="Tell what a recipe costs on any number of ranks: parameters, FLOPs, memory, communication. "
        "Trains nothing and allocates no weights.",
        epilog="Any recipe key can be given as --section.key=value.",
    )
    parser.add_argument("recipe", help="TOML file, e.g. recipes/qwen2_hgrn2.toml")
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks (default: what the recipe's degrees make)")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="whose memory to show (default 0)")
    parser.add_argument("--json", action="store_true", help="write one JSON object, sizes in bytes")
    known, overrides = parser.parse_known_args(arguments)
    with failures_on_one_line():
        return _plan(known, overrides)


def _plan(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from torchlinearmoe.planning import plan
    from torchlinearmoe.planning.report import print_plan
    from torchlinearmoe.recipe import load_recipe

    recipe = load_recipe(options.recipe, overrides)
    world_size = options.world_size if options.world_size is not None else _natural_world(recipe)
    if world_size < 1:
        raise Failure(f"--world-size {world_size}: must be at least 1")
    with progress_bar(f"laying out ranks of {world_size}") as progress:
        found = plan(recipe, world_size, _dtype(recipe), options.rank, progress)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print_plan(found, sys.stdout)
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
