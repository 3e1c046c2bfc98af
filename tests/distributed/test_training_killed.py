"""A killed run goes on as if nothing had happened: the same losses bit for bit, every step once."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from commands import SLOW_SAVE, TRAIN, job, steps_logged, write_recipe
from harness import RankPool
from tiny_run import Result, Settings, read_lines, run, settings, write_corpus

from torchlinearmoe.checkpoint import find_latest

STEPS = 24
LONG: Settings = {
    "model": {"mixer": "gated_delta_net", "layout": "LN", "num_layers": 2},
    "moe": {"balance": "bias", "bias_rate": 0.01},
    "training": {"steps": STEPS, "tokens_per_step": 2 * 48},
    "checkpoint": {"interval": 4, "keep": 2},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def expect_same_bits(folder: Path, never_killed: Result) -> None:
    lines = read_lines(folder)
    assert [line["step"] for line in lines] == list(range(1, len(never_killed.lines) + 1))
    for key in ("loss", "grad_norm", "lr", "tokens", "skipped_steps", "validation_loss"):
        assert [line.get(key) for line in lines] == [line.get(key) for line in never_killed.lines], key


def expect_other_layout_goes_on(results: list[Result], never_killed: list[Result], resumed: int) -> None:
    """`results`: of a run resumed after step `resumed` on other ranks; from there it sees the same sequences."""
    for step in range(resumed + 1, STEPS + 1):
        seen = [sorted(row for result in of for row in result.rows[step]) for of in (results, never_killed)]
        assert seen[0] == seen[1]
    assert min(results[0].rows) == resumed + 1
    assert [line["step"] for line in results[0].lines] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm"):
        assert results[0].column(key) == pytest.approx(never_killed[0].column(key), rel=1e-5)


def step_of(checkpoint: Path | None) -> int:
    assert checkpoint is not None
    return int(checkpoint.stem.removeprefix("step-"))


def saving(folder: Path, after: int) -> bool:
    """Whether the save of a step later than `after` goes on; the one before it is complete then."""
    return any(step_of(path) > after for path in (folder / "checkpoints").glob("step-*.tmp"))


def test_a_process_killed_anywhere_goes_on_exactly(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    never_killed = ranks(1, run, settings(corpus, tmp_path / "whole", LONG), False)
    folder = tmp_path / "run"
    tables = settings(corpus, folder, LONG)
    recipe = str(write_recipe(tables, tmp_path / "run.toml"))
    moment = random.randrange(5, 10), random.random() / 10
    print("killed after step and seconds:", moment)

    with job(tmp_path / "first.log", *TRAIN, recipe) as first:
        first.wait_for(lambda: steps_logged(folder) >= moment[0] and (folder / "checkpoints/step-4").exists())
        time.sleep(moment[1])
        first.kill()
    reached = step_of(find_latest(folder / "checkpoints"))
    assert steps_logged(folder) < STEPS

    with job(tmp_path / "second.log", SLOW_SAVE, "0.3", recipe) as second:
        second.wait_for(lambda: saving(folder, reached + 4))
        second.kill()
    assert saving(folder, reached + 4)  # left behind
    again = step_of(find_latest(folder / "checkpoints"))
    assert again > reached

    shutil.copytree(folder, tmp_path / "two")
    ranks(1, run, tables, False)
    expect_same_bits(folder, never_killed[0])
    assert not list((folder / "checkpoints").glob("*.tmp"))

    results = ranks(2, run, settings(corpus, tmp_path / "two", LONG), False)
    expect_other_layout_goes_on(results, never_killed, again)


@pytest.mark.distributed_full
def test_two_killed_ranks_go_on_exactly(ranks: RankPool, corpus: Path, tmp_path: Path) -> None:
    never_killed = ranks(2, run, settings(corpus, tmp_path / "whole", LONG), False)
    folder = tmp_path / "run"
    tables = settings(corpus, folder, LONG)
    recipe = str(write_recipe(tables, tmp_path / "run.toml"))
    with job(tmp_path / "torchrun.log", SLOW_SAVE, "0.3", recipe, ranks=2) as torchrun:
        torchrun.wait_for(lambda: saving(folder, 4))
        assert len(torchrun.workers()) == 2
        torchrun.kill()
    reached = step_of(find_latest(folder / "checkpoints"))
    assert steps_logged(folder) < STEPS

    shutil.copytree(folder, tmp_path / "one")
    ranks(2, run, tables, False)
    expect_same_bits(folder, never_killed[0])

    results = ranks(1, run, settings(corpus, tmp_path / "one", LONG), False)
    expect_other_layout_goes_on(results, never_killed, reached)


@pytest.mark.slow
def test_torchrun_starts_a_killed_rank_s_group_again_and_the_run_goes_on_exactly(
    ranks: RankPool, corpus: Path, tmp_path: Path
) -> None:
    steps: Settings = {"training": {"steps": 10}}
    never_killed = ranks(2, run, settings(corpus, tmp_path / "whole", LONG, steps), False)
    folder = tmp_path / "run"
    recipe = str(write_recipe(settings(corpus, folder, LONG, steps), tmp_path / "run.toml"))
    with job(tmp_path / "log", SLOW_SAVE, "0.3", recipe, ranks=2, restarts=1) as torchrun:
        torchrun.wait_for(lambda: saving(folder, 4))
        first = torchrun.workers()
        assert steps_logged(folder) < 10
        os.kill(first[1], signal.SIGKILL)
        torchrun.wait_for(lambda: len(torchrun.workers()) == 2 and not {*first} & {*torchrun.workers()})
        assert torchrun.status() == 0, torchrun.log.read_text()
    log = torchrun.log.read_text()
    assert f"resumed from {folder / 'checkpoints/step-4'} after step 4" in log
    expect_same_bits(folder, never_killed[0])
