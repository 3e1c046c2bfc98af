"""All ranks read the same text, also where a run writes into the folder it reads from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from harness import RankPool
from tiny_run import Settings, build, read_lines, settings, write_corpus


def start(rank: int, tables: Settings) -> tuple[int, int, int | None]:
    """Train to the end; the documents of both splits, and where it went on from."""
    trainer = build(tables)
    step = trainer.step
    trainer.run()
    dist.barrier()
    return trainer.splits.train.num_documents, trainer.splits.validation.num_documents, step


@pytest.mark.parametrize("cache, output", [("", "run"), ("cache", "")], ids=["inside", "itself"])
def test_a_run_inside_its_data_reads_the_same_at_every_start(
    ranks: RankPool, tmp_path: Path, cache: str, output: str
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    documents = len(write_corpus(folder).read_text().splitlines())
    changes: dict[str, Any] = {"paths": [str(folder)], "cache": cache and str(folder / cache)}
    for steps in (2, 4):
        tables = settings(
            folder / "corpus.jsonl",
            folder / output,
            {
                "model": {"layout": "L", "num_layers": 2},
                "data": changes | {"validation_fraction": 0.2},
                "training": {"steps": steps},
                "metrics": {"validation_interval": 1},
                "checkpoint": {"interval": 1},
            },
        )
        first, second = ranks(2, start, tables)
        assert first == second
        assert first[0] + first[1] == documents and first[2] == steps - 2
    assert [line["step"] for line in read_lines(folder / output)] == [1, 2, 3, 4]
    (description,) = folder.rglob("store.json")
    assert json.loads(description.read_text())["documents"] == documents
