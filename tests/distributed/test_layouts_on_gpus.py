"""Two GPUs, a model split or its experts spread over them, train as one does."""

from pathlib import Path

import pytest
import torch
from commands import TRAIN, job, write_recipe
from tiny_run import Settings, read_lines, settings, write_corpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

MODEL: Settings = {
    "model": {"layout": "LLN", "num_layers": 3, "hidden_size": 128, "num_heads": 4, "num_kv_heads": 2},
    "moe": {"hidden_size": 64, "shared_hidden_size": 64},
    "training": {"steps": 6, "device": "cuda", "sequence_length": 256, "tokens_per_step": 8 * 256},
}
LAYOUTS: dict[str, Settings] = {
    "tensor": {"parallel": {"tensor": 2}},
    "expert": {"parallel": {"expert": 2}},
    "tensor and expert, compiled": {"parallel": {"tensor": 2, "expert": 2}, "training": {"compile": True}},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), documents=1000)


def train(corpus: Path, folder: Path, ranks: int, *changes: Settings) -> list[float]:
    recipe = write_recipe(settings(corpus, folder, MODEL, *changes), folder.with_suffix(".toml"))
    with job(folder.with_suffix(".log"), *TRAIN, str(recipe), ranks=ranks, gpus=True) as running:
        assert running.status(seconds=300) == 0, running.log.read_text()
    return [line["loss"] for line in read_lines(folder) if "loss" in line]


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses on one GPU."""
    return train(corpus, tmp_path_factory.mktemp("alone") / "run", 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gpus_train_as_one(corpus: Path, tmp_path: Path, alone: list[float], layout: str) -> None:
    assert alone[-1] < alone[0] - 0.1
    assert train(corpus, tmp_path / "run", 2, LAYOUTS[layout]) == pytest.approx(alone, rel=1e-4)
