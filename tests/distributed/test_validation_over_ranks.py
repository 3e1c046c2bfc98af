"""Validation over ranks leaves the shards as they were, and gives the loss of one process, under a capacity too."""

from pathlib import Path

import pytest
from harness import RankPool
from tiny_run import Settings, build, every_run, settings, unsettle, write_corpus
from torch.distributed.tensor import DTensor

from torchlinearmoe.moe import MoE

CAPACITY: Settings = {
    "model": {"layout": "LN", "num_layers": 2, "num_kv_heads": 2, "init_std": 0.3},
    "moe": {"eval_capacity_factor": 0.5, "shared_hidden_size": 0, "shared_gate": False},
    "data": {"validation_fraction": 0.3},
}
LAYOUTS: dict[str, tuple[int, Settings]] = {
    "data 2": (2, {}),
    "tensor 2": (2, {"parallel": {"tensor": 2}}),
    "context 2": (2, {"parallel": {"context": 2}}),
    "expert 2": (2, {"parallel": {"expert": 2}}),
    "context 2 of global counts, by position": (
        2,
        {"parallel": {"context": 2, "expert": 2}, "moe": {"balance_scope": "global", "drop_policy": "position"}},
    ),
    "tensor 2 x context 2, two rows": (
        4,
        {"parallel": {"tensor": 2, "context": 2, "expert": 4}, "training": {"micro_batch_size": 2}},
    ),
    "pipeline 2 x tensor 2": (4, {"parallel": {"pipeline": 2, "tensor": 2}}),
}


def still_sharded(rank: int, tables: Settings) -> bool:
    trainer = build(tables)
    trainer._validate()
    return all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())


def test_validation_gathers_no_weight_for_good(ranks: RankPool, tmp_path: Path) -> None:
    assert all(ranks(2, still_sharded, settings(write_corpus(tmp_path), tmp_path / "run")))


def accuracies(rank: int, tables: Settings) -> tuple[float, float | None]:
    """After a few steps, which teach which ids are values."""
    trainer = build(tables)
    trainer.run()
    return trainer._held_out(0, trainer.splits.validation)


ACCURACY_LAYOUTS: dict[str, tuple[int, Settings]] = {
    "data 2": (2, {}),
    "tensor 2": (2, {"parallel": {"tensor": 2}}),
    "context 2": (2, {"parallel": {"context": 2}}),
    "pipeline 2": (2, {"parallel": {"pipeline": 2}}),
    "pipeline 2 x tensor 2": (4, {"parallel": {"pipeline": 2, "tensor": 2}}),
}


@pytest.mark.parametrize(
    "layout", every_run(ACCURACY_LAYOUTS, *list(ACCURACY_LAYOUTS)[:4], slow=list(ACCURACY_LAYOUTS)[4:])
)
def test_the_accuracy_is_that_of_one_process(ranks: RankPool, tmp_path: Path, layout: str) -> None:
    """Of recall, whose asked keys are few; a vocabulary over ranks agrees on the most probable token."""
    size, changes = ACCURACY_LAYOUTS[layout]
    asked = {
        "model": {"layout": "LN", "num_layers": 2, "num_kv_heads": 2, "init_std": 0.3},
        "data": {
            "paths": None,
            "format": "recall",
            "recall": [{"pairs": 3, "length": 24, "examples": 400}],
            "recall_vocabulary": 16,
            "validation_fraction": 0.5,
        },
        "training": {"steps": 12},
        "optimizer": {"lr": 2e-2},
        "metrics": {"validation_accuracy": True},
    }
    (one,) = ranks(1, accuracies, settings(tmp_path / "none", tmp_path / "one", asked))
    assert one[1] is not None and 0.01 < one[1] < 0.5
    for found in ranks(size, accuracies, settings(tmp_path / "none", tmp_path / "found", asked, changes)):
        assert found == pytest.approx(one, rel=1e-4)


def held_out_losses(rank: int, tables: Settings) -> tuple[float, float]:
    """Under the capacity, and without."""
    trainer = build(tables)
    for part in trainer.parts:
        unsettle(part)
    limited = trainer._held_out_loss()
    for module in trainer.modules.modules():
        if isinstance(module, MoE):
            module.eval_capacity_factor = None
    return limited, trainer._held_out_loss()


@pytest.mark.parametrize("layout", every_run(LAYOUTS, *list(LAYOUTS)[:4], slow=list(LAYOUTS)[4:]))
def test_the_loss_under_a_capacity_is_that_of_one_process(ranks: RankPool, tmp_path: Path, layout: str) -> None:
    """Each packed sequence has its own, wherever its tokens are; the last one ends in padding."""
    size, changes = LAYOUTS[layout]
    corpus, alone = write_corpus(tmp_path), {key: table for key, table in changes.items() if key != "parallel"}
    (one,) = ranks(1, held_out_losses, settings(corpus, tmp_path / "one", CAPACITY, alone))
    assert abs(one[0] - one[1]) > 1e-3, "something is dropped"
    for found in ranks(size, held_out_losses, settings(corpus, tmp_path / "found", CAPACITY, changes)):
        assert found == pytest.approx(one, rel=1e-6)
