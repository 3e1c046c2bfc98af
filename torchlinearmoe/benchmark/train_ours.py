"""Contestant: this project's own training step, by the same code path as `torchlinearmoe.train`."""

from __future__ import annotations

import json
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import torch

from torchlinearmoe.benchmark.contest import answer
from torchlinearmoe.benchmark.floors import step_work, update_bytes
from torchlinearmoe.benchmark.labels import label_ours
from torchlinearmoe.benchmark.profile import profile_steps
from torchlinearmoe.benchmark.timing import time_steps
from torchlinearmoe.data.packing import MicroBatch
from torchlinearmoe.metrics.mfu import mfu
from torchlinearmoe.parallel.mesh import resolve_degrees, tokens_per_step
from torchlinearmoe.recipe import load_recipe
from torchlinearmoe.run_folder import with_tokens_per_step
from torchlinearmoe.runtime import choose_device, process_group

if TYPE_CHECKING:
    from torchlinearmoe.trainer import Trainer


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Figures of `options`: recipe, overrides, sequences, length, steps, profile."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            *options["overrides"],
            f"training.steps={options['steps']}",
            f"training.sequence_length={options['length']}",
            f"training.micro_batch_size={options['sequences']}",
            f"training.tokens_per_step={options['length'] * options['sequences']}",
            f"training.output_dir={json.dumps(folder)}",
            "checkpoint.resume=never",
            "metrics.tensorboard=false",
        ]
        recipe = load_recipe(options["recipe"], overrides)
        degrees = resolve_degrees(recipe.parallel, 1)
        recipe = with_tokens_per_step(recipe, tokens_per_step(recipe.training, degrees))
        device = choose_device(recipe.training)
        with process_group(device):
            from torchlinearmoe.trainer import Trainer

            trainer = Trainer(recipe, degrees, device)
            batch = synthetic_batch(recipe.model.vocab_size, options["sequences"], options["length"])
            batch = batch.pin_memory() if device.type == "cuda" else batch  # as the loader does
            figures = time_steps(lambda: trainer.train_step([batch]), steps=options["steps"], device=device)
            tokens = options["length"] * options["sequences"] / figures["step_s"]
            parameters = sum(p.numel() for p in trainer.whole.parameters())
            return {
                "tokens_per_second": tokens,
                "mfu": mfu(tokens, trainer.flops_per_token, trainer.peak),
                **figures,
                "parameters": parameters / 1e9,
                **({"profile": profile(trainer, batch, figures["step_s"])} if options["profile"] else {}),
            }


def profile(trainer: Trainer, batch: MicroBatch, step_s: float) -> dict[str, Any]:
    """Where a step on `batch` goes, timed at `step_s` seconds."""
    label_ours(trainer.modules)
    optimizer = trainer.optimizer
    slots = [optimizer.slot(p, group) for group in optimizer.param_groups for p in group["params"]]
    work = step_work(
        trainer.whole,
        batch.tokens.numel(),
        trainer.recipe.training.sequence_length,
        trainer.dtype.itemsize,
        update_bytes((slot.weight, (slot.rest, slot.exp_avg, slot.exp_avg_sq)) for slot in slots),
    )
    return profile_steps(lambda: trainer.train_step([batch]), trainer.device, work, step_s)


def synthetic_batch(vocab_size: int, sequences: int, length: int, seed: int = 0) -> MicroBatch:
    """Random tokens, one document a sequence."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (sequences * length,), generator=generator)
    borders = list(range(0, sequences * length + 1, length))
    return MicroBatch(tokens, tokens.roll(-1), borders, length, sequences * length)


if __name__ == "__main__":
    answer(measure(json.loads(sys.argv[1])))
