"""Two launches in one folder: one trains, the other is told so and writes nothing."""

import os
import signal
import time
from pathlib import Path

import pytest
from commands import SLOW_SAVE, TRAIN, job, steps_logged, write_recipe
from tiny_run import Settings, read_lines, settings, write_corpus

STEPS = 200
LONG: Settings = {
    "model": {"layout": "L", "num_layers": 1},
    "training": {"steps": STEPS, "tokens_per_step": 96},
    "checkpoint": {"interval": 5, "keep": 2},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def contents(folder: Path) -> dict[str, int]:
    """Every file of a folder, with its time of change."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_second_run_is_refused_and_the_first_goes_on(corpus: Path, tmp_path: Path, ranks: int) -> None:
    folder = tmp_path / "run"
    recipe = str(write_recipe(settings(corpus, folder, LONG), tmp_path / "run.toml"))
    with job(tmp_path / "first.log", *TRAIN, recipe, ranks=ranks) as first:
        first.wait_for(lambda: steps_logged(folder) >= 2)
        worker = first.workers()[0] if ranks else first.process.pid
        os.kill(worker, signal.SIGSTOP)
        before = contents(folder)
        with job(tmp_path / "second.log", *TRAIN, recipe, ranks=ranks) as second:
            assert second.status() == 1
        assert contents(folder) == before
        os.kill(worker, signal.SIGCONT)
        told = f"error: training.output_dir = '{folder}': another run writes there (process {worker} on "
        assert told in second.log.read_text()
        os.kill(worker, signal.SIGTERM)
        first.process.wait(60)
    assert not (folder / "run.lock").exists()
    assert [line["step"] for line in read_lines(folder)] == list(range(1, steps_logged(folder) + 1))


@pytest.mark.slow
def test_the_lock_goes_with_errors_and_signals_and_stays_after_a_kill(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = str(write_recipe(settings(corpus, folder, LONG), tmp_path / "run.toml"))
    lock = folder / "run.lock"
    with job(tmp_path / "setup.log", SLOW_SAVE, "0", recipe) as run:  # before the loop, which handles signals itself
        run.wait_for(lambda: lock.exists() and lock.stat().st_size > 0)
        assert not steps_logged(folder)
        run.process.send_signal(signal.SIGTERM)
        assert run.status() == 128 + signal.SIGTERM
    assert not lock.exists()
    with job(tmp_path / "error.log", *TRAIN, recipe, "--data.paths=['/nowhere']") as run:
        assert run.status() == 1
    assert "data.paths: '/nowhere' does not exist" in run.log.read_text() and not lock.exists()
    with job(tmp_path / "killed.log", *TRAIN, recipe) as run:
        run.wait_for(lambda: steps_logged(folder) >= 2)
        run.kill()
    assert lock.exists()
    # However far it came before it was seen and killed.
    with job(tmp_path / "again.log", *TRAIN, recipe, f"--training.steps={steps_logged(folder) + 6}") as again:
        assert again.status() == 0
    log = again.log.read_text()
    assert f"{lock}: process {run.process.pid} on " in log and "taken over" in log
    assert not lock.exists()


@pytest.mark.slow
def test_a_group_that_torchrun_starts_again_keeps_its_folder(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = str(write_recipe(settings(corpus, folder, LONG), tmp_path / "run.toml"))
    with job(tmp_path / "log", *TRAIN, recipe, ranks=2, restarts=1) as torchrun:
        torchrun.wait_for(lambda: (folder / "checkpoints/step-5").exists())
        os.kill(torchrun.workers()[1], signal.SIGKILL)
        torchrun.wait_for(lambda: "resumed from" in torchrun.log.read_text())
        time.sleep(0.2)
        assert (folder / "run.lock").exists()
        for worker in torchrun.workers():
            os.kill(worker, signal.SIGTERM)
        torchrun.process.wait(60)
    assert not (folder / "run.lock").exists()
