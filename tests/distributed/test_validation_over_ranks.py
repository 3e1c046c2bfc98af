"""Validation over ranks leaves the shards as they were."""

from pathlib import Path

from harness import RankPool
from tiny_run import Settings, build, settings, write_corpus
from torch.distributed.tensor import DTensor


def still_sharded(rank: int, tables: Settings) -> bool:
    trainer = build(tables)
    trainer._validate()
    return all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())


def test_validation_gathers_no_weight_for_good(ranks: RankPool, tmp_path: Path) -> None:
    assert all(ranks(2, still_sharded, settings(write_corpus(tmp_path), tmp_path / "run")))
