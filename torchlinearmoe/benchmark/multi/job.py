"""What the ranks of a section do: `torchrun ... -m torchlinearmoe.benchmark.multi.job FOLDER`.

FOLDER/runs.json       the runs, each {"kind", "recipe": tables, "folder", ...}, done one after the other; "says", a
                       file that one makes when its turn has come, and "after", files of others that it waits for
FOLDER/answers.jsonl   about the device, then a line a run, by rank 0
FOLDER/error-R.json    why rank R failed; it ends at once, and torchrun ends the others
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchlinearmoe.benchmark.multi.host import POLL, read_lines
from torchlinearmoe.benchmark.multi.overlap import gathers
from torchlinearmoe.benchmark.multi.unsettle import unsettle
from torchlinearmoe.benchmark.timing import time_steps
from torchlinearmoe.benchmark.trace import device_pieces, load_events
from torchlinearmoe.benchmark.train_ours import synthetic_batch
from torchlinearmoe.data.packing import MicroBatch
from torchlinearmoe.metrics.mfu import mfu
from torchlinearmoe.moe.statistics import gather_statistics, load_figures
from torchlinearmoe.parallel.mesh import resolve_degrees, tokens_per_step
from torchlinearmoe.parallel.pipeline import check_micro_batches
from torchlinearmoe.recipe import resolve
from torchlinearmoe.run_folder import with_tokens_per_step
from torchlinearmoe.runtime import choose_device, process_group
from torchlinearmoe.trainer import Trainer

PROFILED = 2
"""Steps under the profiler."""


def losses(run: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Loss of every step on the recipe's data, from moved values; the first step's gradients, as the norm of each
    parameter's; the load of the fullest expert."""
    trainer = build(run, device)
    for part in trainer.parts:
        unsettle(part)
    gradients: dict[str, float] = {}
    with first_gradients(trainer, gradients):
        steps = [trainer.train_step(batches)[0] for batches in trainer.loader]
    packed = gather_statistics(trainer.parts, trainer.meshes.tokens_group, trainer.meshes.pipeline_group)
    figures = load_figures(packed, steps=len(steps))
    return {
        "losses": [loss.item() for loss in steps],
        "gradients": gradients,
        "max_load": figures.get("moe/max_load"),
    }


def speed(run: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Tokens a second and GPU over `steps` steps on random tokens, one document a sequence."""
    trainer = build(run, device)
    batches = synthetic_step(trainer)
    if "after" in run:
        trainer.train_step(batches)  # what is compiled is, beside the others
    await_turn(run, device)
    figures = time_steps(lambda: trainer.train_step(batches), steps=run["steps"], device=device)
    ranks = trainer.meshes.degrees.world_size
    tokens = trainer.tokens_per_step / figures["step_s"]
    memory = torch.tensor(figures["memory_gib"], device=device)
    dist.all_reduce(memory, op=dist.ReduceOp.MAX)
    return {
        "tokens_per_second_per_gpu": tokens / ranks,
        "mfu": mfu(tokens, trainer.flops_per_token, trainer.peak, devices=ranks),
        "step_ms": figures["step_s"] * 1e3,
        "first_step_s": figures["first_step_s"],
        "memory_gib": memory.item(),
    }


def warm(run: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Two steps, for what they leave in the compilers' caches."""
    trainer = build(run, device)
    batches = synthetic_step(trainer)
    for _ in range(2):
        trainer.train_step(batches)
    return {}


def overlap(run: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Milliseconds a step and rank of the collectives of context parallelism, and the share that others hide.

    None where the device has no timeline of its own.
    """
    trainer = build(run, device)
    batches = synthetic_step(trainer)
    for _ in range(run["steps"]):
        trainer.train_step(batches)
    await_turn(run, device)
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(PROFILED):
            trainer.train_step(batches)
        if cuda:
            torch.cuda.synchronize(device)
    trace = Path(run["folder"]) / f"trace-{dist.get_rank()}.json"
    profiler.export_chrome_trace(str(trace))
    total, hidden = gathers(device_pieces(load_events(trace)))
    sums = torch.tensor([total, hidden], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    total, hidden = sums.tolist()
    return {
        "gather_ms": total / 1e3 / PROFILED / dist.get_world_size() if total else None,
        "hidden_share": hidden / total if total else None,
    }


def train(run: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The whole of a run as the train command does it; losses by step, and the step it went on from."""
    await_turn(run, device)
    trainer = build(run, device)
    resumed = trainer.step
    trainer.run()
    lines = read_lines(trainer.folder / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line and line["step"] > resumed]
    return {
        "resumed": resumed,
        "losses": [line["loss"] for line in steps],
        "grad_norms": [line["grad_norm"] for line in steps],
    }


def await_turn(run: dict[str, Any], device: torch.device) -> None:
    """Say that this run's turn has come, and wait for those that come before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.monotonic()
    if says := run.get("says"):
        Path(says).touch()
    while not all(Path(path).exists() for path in run.get("after", [])):
        (Path(run["folder"]).parent / "answers.jsonl").touch()  # it waits, and does not hang
        time.sleep(POLL)
    run["waited_s"] = round(time.monotonic() - began, 1)


KINDS = {"losses": losses, "speed": speed, "overlap": overlap, "warm": warm, "train": train}


def build(run: dict[str, Any], device: torch.device) -> Trainer:
    """The trainer of a run's recipe in its folder, or where the recipe says."""
    tables = {**run["recipe"]}
    tables["training"] = {"output_dir": run["folder"], **tables["training"]}
    recipe = resolve(tables)
    degrees = resolve_degrees(recipe.parallel, dist.get_world_size())
    recipe = with_tokens_per_step(recipe, tokens_per_step(recipe.training, degrees))
    check_micro_batches(recipe, degrees)
    return Trainer(recipe, degrees, device)


@contextmanager
def first_gradients(trainer: Trainer, gradients: dict[str, float]) -> Iterator[None]:
    """Fill `gradients` with the norms of the first step inside, by parameter, those of all pipeline stages."""
    complete = trainer._gradient_norm

    def watched() -> Tensor:
        norm = complete()
        if not gradients:
            for part in trainer.parts:
                for name, parameter in part.named_parameters():
                    grad = parameter.grad
                    assert grad is not None, name
                    gradients[name] = float((grad.full_tensor() if isinstance(grad, DTensor) else grad).norm())
            stages: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(stages, gradients)
            for stage in stages:
                gradients.update(stage)
        return norm

    trainer._gradient_norm = watched
    yield


def synthetic_step(trainer: Trainer) -> list[MicroBatch]:
    """This rank's micro-batches of a step; data ranks have different ones."""
    training, data_ranks = trainer.recipe.training, trainer.meshes.degrees.data_ranks
    sequences, length = training.micro_batch_size, training.sequence_length
    number = trainer.tokens_per_step // (sequences * length * data_ranks)
    seeds = range(trainer.meshes.data_rank * number, (trainer.meshes.data_rank + 1) * number)
    batches = [synthetic_batch(trainer.recipe.model.vocab_size, sequences, length, seed) for seed in seeds]
    return [batch.pin_memory() for batch in batches] if trainer.device.type == "cuda" else batches


@contextmanager
def fresh(device: torch.device) -> Iterator[None]:
    """What one run leaves in memory is gone before the next."""
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(folder: Path) -> None:
    """Do the runs of `folder`."""
    runs = json.loads((folder / "runs.json").read_text())
    device = choose_device(resolve(runs[0]["recipe"]).training)
    with process_group(device):
        rank = dist.get_rank()
        try:
            with (folder / "answers.jsonl").open("a") if rank == 0 else open(os.devnull, "w") as answers:
                chip = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
                start_s = round(time.time() - (folder / "runs.json").stat().st_mtime, 1)
                print(json.dumps({"chip": chip, "start_s": start_s}), file=answers, flush=True)
                for run in runs:
                    Path(run["folder"]).mkdir(parents=True, exist_ok=True)
                    began = time.monotonic()
                    with fresh(device):
                        figures = KINDS[run["kind"]](run, device)
                    waited_s = run.get("waited_s", 0.0)
                    figures |= {"run_s": round(time.monotonic() - began - waited_s, 1), "waited_s": waited_s}
                    print(json.dumps(figures), file=answers, flush=True)
        except Exception as error:
            # The others may wait in a collective for ever: nothing here waits for them.
            traceback.print_exc()
            said = " ".join(str(error).split())[:300]
            (folder / f"error-{rank}.json").write_text(json.dumps(f"{type(error).__name__}: {said}"))
            sys.stderr.flush()
            os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
