"""SIGTERM and Ctrl-C end a run after the step under way, with a checkpoint, and the run goes on from it."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from commands import TRAIN, Job, job, steps_logged, write_recipe
from harness import RankPool
from tiny_run import Result, Settings, read_lines, run, settings, write_corpus

from torchlinearmoe.checkpoint import find_latest
from torchlinearmoe.trainer import Trainer

STEPS = 24
LONG: Settings = {
    "model": {"layout": "L", "num_layers": 2},
    "training": {"steps": STEPS, "tokens_per_step": 2 * 48},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def never_stopped(ranks: RankPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return ranks(2, run, settings(corpus, tmp_path_factory.mktemp("whole"), LONG), False)[0]


def signalled(rank: int, tables: Settings, victim: int, number: int) -> Result:
    """A run in which rank `victim` is sent a signal in the middle of step 5."""
    inputs = Trainer._inputs

    def interrupted(self: Trainer, batch: Any, totals: Any) -> Any:
        if self.step == 4 and rank == victim:
            os.kill(os.getpid(), number)
        return inputs(self, batch, totals)

    Trainer._inputs = interrupted  # type: ignore[method-assign]
    try:
        return run(rank, tables, False)
    finally:
        Trainer._inputs = inputs  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "victim, number", [pytest.param(0, signal.SIGINT, marks=pytest.mark.distributed_full), (1, signal.SIGTERM)]
)
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(
    ranks: RankPool, corpus: Path, tmp_path: Path, never_stopped: Result, victim: int, number: int
) -> None:
    tables = settings(corpus, tmp_path / "run", LONG)
    for result in ranks(2, signalled, tables, victim, number):
        assert result.stopped == number
        assert [line["step"] for line in result.lines] == [1, 2, 3, 4, 5, 6]  # told the others with the next step
    assert find_latest(tmp_path / "run/checkpoints") == tmp_path / "run/checkpoints/step-6"
    result = ranks(2, run, tables, False)[0]
    assert result.column("loss") == never_stopped.column("loss")
    assert result.column("grad_norm") == never_stopped.column("grad_norm")


def expect_saved(folder: Path, stopped: Job, name: str) -> None:
    """The last line's step is saved, the log says so, and nothing crashed on the way."""
    step = read_lines(folder)[-1]["step"]
    assert 5 <= step < STEPS
    assert find_latest(folder / "checkpoints") == folder / f"checkpoints/step-{step}"
    log = stopped.log.read_text()
    assert f"stopped by {name} after step {step}; the checkpoint is saved" in log


def test_ctrl_c_saves_and_ends_with_the_signal_s_status(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tables = settings(corpus, folder, LONG, {"data": {"workers": 1}})
    recipe = str(write_recipe(tables, tmp_path / "run.toml"))
    with job(tmp_path / "log", *TRAIN, recipe) as training:
        training.wait_for(lambda: steps_logged(folder) >= 5)
        os.killpg(training.process.pid, signal.SIGINT)  # as a terminal does: the loader's processes get it too
        assert training.status() == 128 + signal.SIGINT
    expect_saved(folder, training, "SIGINT")
    assert "Traceback" not in training.log.read_text()


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_and_quietly(corpus: Path, tmp_path: Path) -> None:
    tables = settings(corpus, tmp_path / "run", LONG, {"training": {"steps": 2000}})
    script = tmp_path / "slow_step.py"
    script.write_text(
        "import sys, time\nfrom torchlinearmoe import trainer\nfrom torchlinearmoe.train import main\n"
        "step = trainer.Trainer.train_step\n"
        "def slow(self, *args):\n    time.sleep(60 * (self.step == 3))\n    return step(self, *args)\n"
        "trainer.Trainer.train_step = slow\nsys.exit(main(sys.argv[1:]))\n"
    )
    with job(tmp_path / "log", str(script), str(write_recipe(tables, tmp_path / "run.toml"))) as training:
        training.wait_for(lambda: steps_logged(tmp_path / "run") >= 3)
        time.sleep(0.3)
        for _ in range(2):
            os.kill(training.process.pid, signal.SIGINT)
            time.sleep(0.3)
        assert training.status(20) == 128 + signal.SIGINT
    log = training.log.read_text()
    assert "Traceback" not in log and "KeyboardInterrupt" not in log
    assert log.splitlines()[-1].startswith("step 3/")


@pytest.mark.slow
def test_torchrun_passes_sigterm_on_and_the_run_goes_on(
    ranks: RankPool, corpus: Path, tmp_path: Path, never_stopped: Result
) -> None:
    folder = tmp_path / "run"
    tables = settings(corpus, folder, LONG)
    recipe = str(write_recipe(tables, tmp_path / "run.toml"))
    with job(tmp_path / "log", *TRAIN, recipe, ranks=2) as torchrun:
        torchrun.wait_for(lambda: steps_logged(folder) >= 5)
        torchrun.process.send_signal(signal.SIGTERM)
        torchrun.status()
    expect_saved(folder, torchrun, "SIGTERM")
    result = ranks(2, run, tables, False)[0]
    assert result.column("loss") == never_stopped.column("loss")
    assert [line["step"] for line in result.lines] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_mistake_under_torchrun_is_told_once(corpus: Path, tmp_path: Path) -> None:
    tables = settings(corpus, tmp_path / "run", LONG, {"data": {"paths": ["/nowhere.jsonl"]}})
    recipe = str(write_recipe(tables, tmp_path / "run.toml"))
    with job(tmp_path / "log", *TRAIN, recipe, ranks=2) as torchrun:
        assert torchrun.status() == 1
    log = torchrun.log.read_text()
    line = (
        "error: data.paths: '/nowhere.jsonl' does not exist; name a file, a folder or a pattern of files that are there"
    )
    assert [text for text in log.splitlines() if text.startswith("error: ")] == [line]
    # What follows is torchrun's own; nothing of ours is in its stack, and our line comes last as well.
    assert "torchlinearmoe/" not in log.split("does not exist", 1)[1].split("FAILED")[0]
    *_, last, ruler = log.splitlines()
    assert last.endswith(f": {line}") and set(ruler) == {"="}
