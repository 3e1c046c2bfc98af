"""A pipeline of stages trains the same model as one process, in every schedule and with what runs inside a stage."""

from pathlib import Path

import pytest
from harness import RankPool
from tiny_run import Result, Settings, assert_same_training, run, settings, write_corpus

HYBRID: Settings = {"model": {"layout": "LLLN", "num_layers": 4}, "training": {"steps": 4}}
SCHEDULES: dict[str, Settings] = {
    "1f1b": {"parallel": {"pipeline": 2}},
    "interleaved": {"parallel": {"pipeline": 2, "pipeline_schedule": "interleaved"}},
    "zero_bubble": {
        "parallel": {"pipeline": 2, "pipeline_schedule": "zero_bubble", "reshard_after_forward": False},
    },
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def joined(results: list[Result]) -> Result:
    """One result of all ranks: the gradients and the state of all stages, the figures of rank 0."""
    gradients, state = {}, {}
    for result in results:
        for name, gradient in result.gradients.items():
            assert name not in gradients or (gradients[name] - gradient).norm() < 1e-6 * gradient.norm(), name
            gradients[name] = gradient
        state |= result.state
    return results[0]._replace(gradients=gradients, state=state)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_trains_as_one_process_does(
    ranks: RankPool, corpus: Path, tmp_path: Path, schedule: str
) -> None:
    (one,) = ranks(1, run, settings(corpus, tmp_path / "one", HYBRID))
    results = ranks(2, run, settings(corpus, tmp_path / "two", HYBRID, SCHEDULES[schedule]))
    assert_same_training(joined(results), one)
