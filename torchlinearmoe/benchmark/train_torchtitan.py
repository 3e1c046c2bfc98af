"""Contestant: torchtitan's Qwen3-MoE of the same shape, softmax attention in every layer, in its own Trainer on a GPU.

float32 weights and Adam states, bfloat16 products, fused AdamW, FlexAttention, the loss in chunks, compiled. As its
model has them, queries and keys are normed, shared experts have no gate, and a bias balances the load. With its CUDA
graphs, as it ships, or without.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from typing import Any

import torch

from torchlinearmoe.benchmark.contest import answer
from torchlinearmoe.benchmark.floors import softmax_twin, step_work, update_bytes
from torchlinearmoe.benchmark.labels import label_torchtitan
from torchlinearmoe.benchmark.peer_shapes import refuse_other_shapes
from torchlinearmoe.benchmark.profile import profile_steps
from torchlinearmoe.benchmark.timing import time_steps
from torchlinearmoe.errors import UserError
from torchlinearmoe.recipe import load_recipe
from torchlinearmoe.recipe.schema import ModelRecipe

WITHOUT = "or leave torchtitan out of --contestants"
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""What a launcher tells the only process of a run; it finds a free port itself."""


def installed() -> bool:
    """Whether the package is there; nothing is imported."""
    return importlib.util.find_spec("torchtitan") is not None


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Figures of `options`: recipe, overrides, sequences, length, steps, graphs, profile.

    Raises UserError where torchtitan cannot run, or has no model of the recipe's shape.
    """
    recipe = load_recipe(options["recipe"], options["overrides"]).model
    refuse_other_shapes(recipe, "torchtitan's Qwen3-MoE", ("model.head_dim",))
    if not installed():
        raise UserError(f"torchtitan is not installed: pip install torchtitan==0.3.0, {WITHOUT}")
    if not torch.cuda.is_available():
        raise UserError(f"torchtitan trains on GPUs and none is visible: run on a GPU, {WITHOUT}")
    os.environ |= ALONE
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as its launcher does
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _figures(recipe, options, folder)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise UserError(
            f"this torchtitan does not run with torch {torch.__version__} ({type(error).__name__}: {reason}): "
            f"install torchtitan 0.3.0 beside torch 2.13, {WITHOUT}"
        ) from error


def _figures(recipe: ModelRecipe, options: dict[str, Any], folder: str) -> dict[str, Any]:
    from torchlinearmoe.benchmark.torchtitan_config import trainer_config

    sequences, length = options["sequences"], options["length"]
    tokens = sequences * length
    trainer = trainer_config(recipe, sequences, length, graphs=options["graphs"], folder=folder).build()
    batches = trainer.batch_generator(trainer.dataloader)

    def step() -> None:
        trainer.step += 1
        trainer.gc_handler.run(trainer.step)
        trainer.train_step(batches)

    def profile(step_s: float) -> dict[str, Any]:
        label_torchtitan(trainer)
        states = (
            (p, (state["exp_avg"], state["exp_avg_sq"]))
            for optimizer in trainer.optimizers
            for p, state in optimizer.state.items()
        )
        work = step_work(softmax_twin(recipe), tokens, length, 2, update_bytes(states))
        return profile_steps(step, trainer.device, work, step_s)

    figures = time_steps(step, steps=options["steps"], device=trainer.device)
    result = {
        "tokens_per_second": tokens / figures["step_s"],
        "mfu": None,
        **figures,
        "parameters": sum(p.numel() for p in trainer.model_parts[0].parameters()) / 1e9,
        **({"profile": profile(figures["step_s"])} if options["profile"] else {}),
    }
    trainer.close()
    torch.distributed.destroy_process_group()
    return result


if __name__ == "__main__":
    try:
        answer(measure(json.loads(sys.argv[1])))
    except UserError as error:
        answer({"error": str(error)})
