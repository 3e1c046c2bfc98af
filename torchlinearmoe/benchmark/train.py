"""`benchmark train`: training steps of a recipe at several shapes, beside transformers' and torchtitan's.

Theirs are models of the same shape with softmax attention in every layer. torchtitan runs by default where it is
installed.

With `--profile` every contestant then tells where its step goes: `categories` says what counts as what, `floors` how
the least is counted that each category could take, at rates measured in the same process.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from torchlinearmoe.benchmark.contest import run_contestant, show
from torchlinearmoe.benchmark.profile import show_profile
from torchlinearmoe.benchmark.train_torchtitan import installed as torchtitan_installed
from torchlinearmoe.errors import RecipeError

OURS = "torchlinearmoe.benchmark.train_ours"
TRANSFORMERS = "torchlinearmoe.benchmark.train_transformers"
TORCHTITAN = "torchlinearmoe.benchmark.train_torchtitan"
ALWAYS = ["ours", "ours-eager", "transformers", "transformers-compiled"]
WHERE_INSTALLED = ["torchtitan", "torchtitan-graphs"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    parser.add_argument("--recipe", default="recipes/qwen2_hgrn2.toml", help="TOML recipe (default: %(default)s)")
    parser.add_argument(
        "--shapes", nargs="+", default=["8x2048", "1x16384"], help="SEQUENCESxLENGTH of a step (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=20, help="steps a contestant (default: %(default)s)")
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=[*ALWAYS, *WHERE_INSTALLED],
        default=[*ALWAYS, *WHERE_INSTALLED] if torchtitan_installed() else ALWAYS,
        help="who runs (default: all, torchtitan where it is installed)",
    )
    parser.add_argument(
        "--profile", action="store_true", help="after the timing, where a step goes, by category, beside its floors"
    )
    parser.add_argument("--timeout", type=float, default=300, help="seconds a contestant (default: %(default)s)")


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run the contest and print its table; 1 when nobody finished."""
    if arguments.steps < 3:
        raise RecipeError(f"--steps {arguments.steps}: must be at least 3")
    rows: list[dict[str, Any]] = []
    profiles: dict[str, dict[str, Any]] = {}
    for shape in arguments.shapes:
        sequences, _, length = shape.partition("x")
        if not (sequences.isdigit() and length.isdigit() and int(sequences) and int(length)):
            raise RecipeError(f"--shapes {shape}: a shape reads SEQUENCESxLENGTH, e.g. 8x2048")
        for name in arguments.contestants:
            of_compiled = "training.compile_backend="
            options: dict[str, Any] = {
                "recipe": arguments.recipe,
                "overrides": [text for text in overrides if name == "ours" or of_compiled not in text],
                "sequences": int(sequences),
                "length": int(length),
                "steps": arguments.steps,
                "profile": arguments.profile,
            }
            if name.startswith("ours"):
                options["overrides"].append(f"training.compile={'false' if name == 'ours-eager' else 'true'}")
                figures = run_contestant(OURS, options, arguments.timeout)
            elif name.startswith("torchtitan"):
                options["graphs"] = name == "torchtitan-graphs"
                figures = run_contestant(TORCHTITAN, options, arguments.timeout)
            else:
                options["compile"] = name == "transformers-compiled"
                figures = run_contestant(TRANSFORMERS, options, arguments.timeout)
            if "profile" in figures:
                profiles[f"{name}, {shape}"] = figures.pop("profile")
            rows.append({"contestant": name, "shape": shape, **figures})
            print(rows[-1], flush=True)
    for title, found in profiles.items():
        show_profile(title, found)
    show(f"training, {arguments.recipe} {' '.join(overrides)}", rows)
    return 0 if any("error" not in row for row in rows) else 1
