"""`benchmark optimizer`: the update alone over a recipe's parameters, beside torch's fused AdamW; no model runs.

Milliseconds, GB/s of the bytes that each form moves, and their share of the rate of a large copy in the same process.
Every contestant is held to the definition of the update on slices of some parameters before it is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from torchlinearmoe.benchmark.contest import run_contestant, show
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.recipe import load_recipe

CONTESTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours-float32": ("torchlinearmoe.benchmark.update_ours", {"states": "float32"}),
    "ours-bfloat16": ("torchlinearmoe.benchmark.update_ours", {"states": "bfloat16"}),
    "torch-masters": ("torchlinearmoe.benchmark.update_torch", {"masters": True}),
    "torch-bfloat16": ("torchlinearmoe.benchmark.update_torch", {"masters": False}),
}
WITHOUT_GPU = 50_000_000
"""Parameters at most."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    parser.add_argument("--recipe", default="recipes/qwen2_hgrn2.toml", help="TOML recipe (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="updates a figure (default: %(default)s)")
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=list(CONTESTANTS),
        default=list(CONTESTANTS),
        help="ours by type of the moments; torch on float32 masters, or on bfloat16 weights alone (default: all)",
    )
    parser.add_argument("--timeout", type=float, default=300, help="seconds a contestant (default: %(default)s)")


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run all contestants and print their table; 1 when nobody finished."""
    if arguments.repeats < 3:
        raise RecipeError(f"--repeats {arguments.repeats}: must be at least 3")
    recipe = load_recipe(arguments.recipe, overrides)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Decoder(recipe.model).parameters())
    if not torch.cuda.is_available() and parameters > WITHOUT_GPU:
        raise RecipeError(
            f"--recipe {arguments.recipe}: {parameters / 1e6:.0f}M parameters and no GPU is visible; without one give "
            f"a model of at most {WITHOUT_GPU / 1e6:.0f}M, such as --recipe recipes/quickstart.toml"
        )
    rows: list[dict[str, Any]] = []
    for name in arguments.contestants:
        module, chosen = CONTESTANTS[name]
        options = {
            "recipe": arguments.recipe,
            "overrides": list(overrides),
            "repeats": arguments.repeats,
            **chosen,
        }
        figures = run_contestant(module, options, arguments.timeout)
        found = figures.pop("rows", [figures])
        rows += [{"contestant": name, **row} for row in found]
        print({"contestant": name, **figures}, flush=True)
    show(f"optimizer, {parameters / 1e6:.1f}M parameters of {arguments.recipe} {' '.join(overrides)}", rows)
    return 0 if any("ms" in row for row in rows) else 1
