"""A step with a loss or gradient that is not finite happens on no rank, and many in a row end the run."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPool
from tiny_run import Settings, build, read_lines, settings, write_corpus
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchlinearmoe import trainer as trainer_module
from torchlinearmoe.checkpoint import find_latest
from torchlinearmoe.parallel.passes import Loop
from torchlinearmoe.trainer import Diverged, Trainer

SMALL: Settings = {
    "model": {"layout": "LN", "num_layers": 2},
    "moe": {"balance": "bias", "bias_rate": 0.01},
    "training": {"steps": 8, "max_skipped_steps": 3},
    "checkpoint": {"interval": 2},
}


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def everything(trainer: Trainer) -> list[Tensor]:
    """Copies of this rank's parameters, router biases and Adam states, step counts included."""
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    return [local(value.detach()).clone() for value in [*trainer.model.state_dict().values(), *states]]


def skip_steps(rank: int, tables: Settings, kind: str, bad_steps: tuple[int, ...]) -> list[bool]:
    """Train with rank 1's loss or gradient spoilt at some steps; whether each step left everything as it was."""
    trainer = build(tables)
    step, loss, norm = Trainer.train_step, Loop.loss, trainer_module.gradient_norm
    unchanged: list[bool] = []

    def spoilt() -> bool:
        return trainer.step + 1 in bad_steps and rank == 1

    def step_watched(self: Trainer, *args: Any) -> Any:
        before = everything(self)
        result = step(self, *args)
        after = everything(self)
        unchanged.append(len(before) == len(after) and all(map(torch.equal, before, after)))
        return result

    def spoilt_loss(self: Loop, batch: Any) -> Tensor:
        return loss(self, batch) * (math.nan if kind == "loss" and spoilt() else 1.0)

    def spoilt_gradient(parameters: Any, *args: Any) -> Tensor:
        if kind == "gradient" and spoilt():
            gradient = trainer.model.get_parameter("layers.1.ffn.experts.down").grad
            gradient.to_local().view(-1)[0] = math.inf
        return norm(parameters, *args)

    Trainer.train_step, Loop.loss = step_watched, spoilt_loss  # type: ignore[method-assign]
    trainer_module.gradient_norm = spoilt_gradient
    try:
        trainer.run()
    finally:
        Trainer.train_step, Loop.loss = step, loss  # type: ignore[method-assign]
        trainer_module.gradient_norm = norm
    return unchanged


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_all_ranks_skip_a_step_that_one_rank_spoils(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    tables = settings(write_corpus(tmp_path), tmp_path / "run", SMALL)
    bad = (3, 4, 7)  # never three in a row
    for unchanged in ranks(2, skip_steps, tables, kind, bad):
        assert unchanged == [step in bad for step in range(1, 9)]
    lines = read_lines(tmp_path / "run")
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 2, 2, 2, 3, 3]
    broken = "loss" if kind == "loss" else "grad_norm"
    assert [line[broken] is None for line in lines] == [line["step"] in bad for line in lines]
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert saved == ["step-2", "step-6", "step-8"]  # not step 4, which was skipped


def diverge(rank: int, tables: Settings, place: str) -> str:
    """Spoil a weight before step 6; the message the run ends with."""
    trainer = build(tables)
    step = Trainer.train_step

    def spoil(self: Trainer, *args: Any) -> Any:
        if self.step == 5:
            if place == "parameter" and rank == dist.get_world_size() - 1:
                local(self.model.get_parameter("layers.1.mixer.o_proj.weight").data).view(-1)[0] = math.nan
            elif place == "activation":  # finite weights, infinite products
                local(self.model.get_parameter("layers.1.mixer.v_proj.weight").data).fill_(3e38)
        return step(self, *args)

    Trainer.train_step = spoil  # type: ignore[method-assign]
    try:
        trainer.run()
    except Diverged as error:
        return str(error)
    finally:
        Trainer.train_step = step  # type: ignore[method-assign]
    raise AssertionError("the run went on")


@pytest.mark.parametrize(
    "place, named",
    [
        ("parameter", "the parameter layers.1.mixer.o_proj.weight"),
        ("activation", "the output of layers.1.mixer (softmax_attention)"),
    ],
)
def test_a_run_that_stays_broken_ends_and_names_the_layer(
    ranks: RankPool, tmp_path: Path, place: str, named: str
) -> None:
    tables = settings(write_corpus(tmp_path), tmp_path / "run", SMALL, {"training": {"steps": 50}})
    for message in ranks(2, diverge, tables, place):
        assert message == (
            f"3 steps in a row had a loss or gradient that is not finite, first bad: {named}; stopped after step 8, "
            f"last good checkpoint: {tmp_path}/run/checkpoints/step-4"
        )
    assert find_latest(tmp_path / "run/checkpoints") == tmp_path / "run/checkpoints/step-4"
    assert [line["step"] for line in read_lines(tmp_path / "run")] == list(range(1, 8))
