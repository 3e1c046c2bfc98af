"""The command: `torchrun --nproc_per_node=N -m torchlinearmoe.train RECIPE [--section.key=value ...]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torchlinearmoe.commands import Failure, failures_on_one_line
from torchlinearmoe.errors import RecipeError, visible


def main(arguments: Sequence[str] | None = None) -> int:
    """Train a recipe; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m torchlinearmoe.train",
        description="Train a Linear-MoE language model from a TOML recipe.",
        epilog="Any recipe key can be given as --section.key=value. Under torchrun, one process a GPU (or CPU rank).",
    )
    parser.add_argument("recipe", help="TOML file, e.g. recipes/quickstart.toml")
    known, overrides = parser.parse_known_args(arguments)
    with failures_on_one_line():
        return _train(known.recipe, overrides)


def _train(path: str, overrides: Sequence[str]) -> int:
    from torchlinearmoe.parallel.mesh import Degrees, resolve_degrees, tokens_per_step
    from torchlinearmoe.parallel.pipeline import check_micro_batches
    from torchlinearmoe.recipe import Recipe, load_recipe
    from torchlinearmoe.recipe.validate import check_steps
    from torchlinearmoe.resume import Finished, with_saved_tokens_per_step
    from torchlinearmoe.run_folder import at_home, with_tokenizer, with_tokens_per_step
    from torchlinearmoe.run_lock import locked
    from torchlinearmoe.runtime import choose_device, on_rank_0, process_group, world_size

    def resolved(recipe: Recipe, degrees: Degrees) -> Recipe:
        recipe = with_tokens_per_step(recipe, tokens_per_step(recipe.training, degrees))
        check_steps(recipe)
        check_micro_batches(recipe, degrees)
        return recipe

    # Everything that can be refused without other ranks is refused before they are needed.
    recipe = at_home(load_recipe(path, overrides))
    degrees = resolve_degrees(recipe.parallel, world_size())
    recipe = with_tokenizer(recipe)
    if recipe.training.tokens_per_step is not None:
        recipe = resolved(recipe, degrees)
    device = choose_device(recipe.training)
    with process_group(device), locked(Path(recipe.training.output_dir)):
        given, recipe = recipe, on_rank_0(lambda: with_saved_tokens_per_step(recipe))
        try:
            recipe = resolved(recipe, degrees)
        except RecipeError as error:
            if recipe == given:
                raise
            raise RecipeError(f"{error}; it is the checkpoint's: take a smaller micro-batch, or fewer ranks") from None
        import torch.distributed as dist

        from torchlinearmoe.trainer import Diverged, Trainer

        try:
            stopped = Trainer(recipe, degrees, device).run()
        except Finished as done:
            if dist.get_rank() == 0:
                print(visible(str(done)), flush=True)
            return 0
        except Diverged as error:
            raise Failure(str(error)) from None
        return 128 + stopped if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
