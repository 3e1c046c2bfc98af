"""Masters and moments move unchanged between halves on one rank and shards on several, whatever their types."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import RankPool
from tiny_run import Result, Settings, build, run, settings, whole, write_corpus
from torch import Tensor

from torchlinearmoe.checkpoint.state import model_tensors, optimizer_tensors
from torchlinearmoe.optim import sums
from torchlinearmoe.optim.masters import rest_of

MODEL: Settings = {
    "model": {"layout": "LN", "num_layers": 2, "num_kv_heads": 2},
    "training": {"dtype": "bfloat16", "tokens_per_step": 4 * 48},
    "optimizer": {"schedule": "constant", "states": "bfloat16"},
}
LAYOUTS: dict[str, tuple[int, Settings]] = {
    "one process": (1, {}),
    "fsdp 2": (2, {}),
    "tensor 2": (2, {"parallel": {"tensor": 2}}),
    "ep 2": (2, {"parallel": {"expert": 2}}),
    "tensor 2 x fsdp 2": (4, {"parallel": {"tensor": 2}}),
}


def held(rank: int, tables: Settings) -> tuple[dict[str, Tensor], set[str]]:
    """The whole masters and moments of a resumed run, and which parameters are halves; then a step, which must work."""
    trainer = build(tables)
    tensors = model_tensors(trainer.model) | optimizer_tensors(trainer.parts, [trainer.optimizer])[0]
    found = {name: whole(tensor) for name, tensor in tensors.items()}
    halves = {name for name, parameter in trainer.model.named_parameters() if rest_of(parameter) is not None}
    loss, norm, _ = trainer.train_step(next(iter(trainer.loader)))
    assert bool(loss.isfinite()) and bool(norm.isfinite())
    return found, halves


@pytest.mark.parametrize("start", ["one process", "fsdp 2"])
def test_nothing_is_rounded_on_the_way(ranks: RankPool, tmp_path: Path, start: str) -> None:
    corpus = write_corpus(tmp_path)

    def tables(layout: str, output: str, steps: int, resume: str = "latest") -> Settings:
        changes: Settings = {"training": {**MODEL["training"], "steps": steps}, "checkpoint": {"resume": resume}}
        return settings(corpus, tmp_path / output, MODEL, LAYOUTS[layout][1], changes)

    ranks(LAYOUTS[start][0], run, tables(start, "first", 2))
    saved = str(tmp_path / "first" / "checkpoints" / "step-2")
    states = {}
    for layout in LAYOUTS:
        results = ranks(LAYOUTS[layout][0], held, tables(layout, layout.replace(" ", ""), 3, saved))
        states[layout], halves = results[0]
        assert ("embed.weight" in halves) == (layout in ("one process", "tensor 2"))
        assert ("layers.0.ffn.experts.down" in halves) == (layout in ("one process", "ep 2"))
        assert not any("router" in name for name in halves)
    expected = states[start]
    assert any(value.dtype == torch.bfloat16 for value in expected.values())
    for layout, found in states.items():
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), (layout, name)


def run_in_parts(rank: int, tables: Settings) -> Result:
    """A run whose gradients all count as large: each ends in two parts."""
    large, sums.LARGE = sums.LARGE, 1
    try:
        return run(rank, tables)
    finally:
        sums.LARGE = large


@pytest.mark.parametrize("call", [pytest.param(run, marks=pytest.mark.slow), run_in_parts], ids=["whole", "in parts"])
def test_halves_train_as_shards_do(ranks: RankPool, tmp_path: Path, call: Callable[..., Result]) -> None:
    """Five steps in bfloat16, several micro-batches summed: one process beside ranks of FSDP, ep and tensor."""
    corpus = write_corpus(tmp_path)
    curves = {}
    for layout in ("one process", "fsdp 2", "ep 2", "tensor 2"):
        table = settings(
            corpus, tmp_path / layout, MODEL, LAYOUTS[layout][1], {"training": {**MODEL["training"], "steps": 5}}
        )
        results = ranks(LAYOUTS[layout][0], call, table)
        curves[layout] = results[0].column("loss"), results[0].column("grad_norm")
        for name, value in results[0].state.items():  # replicas stay equal
            assert all(torch.equal(result.state[name], value) for result in results), (layout, name)
    # Products and sums in bfloat16, whose step is 4e-3 to 8e-3, fall otherwise where they are cut otherwise.
    for layout, (losses, norms) in curves.items():
        assert len(losses) == 5 and losses == pytest.approx(curves["one process"][0], rel=1e-3), layout
        assert norms == pytest.approx(curves["one process"][1], rel=2e-2), layout
