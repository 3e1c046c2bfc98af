"""Twenty kills of one run, anywhere: while it starts, trains or saves, and two launches at once. Its end is bit for bit
that of a run that nobody disturbed."""

import random
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from commands import SLOW_SAVE, TRAIN, Job, job, steps_logged, write_recipe
from test_training_killed import expect_same_bits, saving, step_of
from tiny_run import Result, Settings, read_lines, settings, write_corpus
from torch import Tensor

from torchlinearmoe.checkpoint import find_latest
from torchlinearmoe.checkpoint.storage import CheckpointReader, expect_one_process, read_metadata

KILLS, STEPS = 20, 400
LONG: Settings = {
    "model": {"mixer": "gated_delta_net", "layout": "LN", "num_layers": 2},
    "moe": {"balance": "bias", "bias_rate": 0.01},
    "training": {"steps": STEPS, "tokens_per_step": 2 * 48},
    "checkpoint": {"interval": 4, "keep": 2},
}
MOMENTS = ("starting", "training", "saving", "two at once", "two starting")


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Everything that a checkpoint holds of model and optimizer."""
    metadata = read_metadata(checkpoint)
    found = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
        for key, entry in metadata.state_dict_metadata.items()
    }
    expect_one_process()
    dcp.load(found, storage_reader=CheckpointReader(checkpoint, metadata), no_dist=True)
    return found


def reached(folder: Path) -> int:
    """The step of the newest sound checkpoint; 0 without one."""
    latest = find_latest(folder / "checkpoints")
    return step_of(latest) if latest else 0


def wait_for(happened: Job, folder: Path, moment: str, chooser: random.Random) -> None:
    """Return at a random instant of a kind."""
    logged, saved = steps_logged(folder), reached(folder)
    if moment.endswith("starting"):
        time.sleep(6 * chooser.random())
        return
    steps = chooser.randrange(1, 9)
    if moment == "saving":
        happened.wait_for(lambda: saving(folder, saved))
        time.sleep(chooser.random() / 20)
    else:  # the record is cut back to the checkpoint first
        happened.wait_for(lambda: saved < steps_logged(folder) != logged)
        base = steps_logged(folder)
        happened.wait_for(lambda: steps_logged(folder) >= base + steps)
        time.sleep(chooser.random() / 20)


@pytest.mark.distributed_full
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("ranks", [0, 2])
def test_twenty_kills_change_nothing(tmp_path: Path, ranks: int) -> None:
    corpus = write_corpus(tmp_path)
    recipes = [
        str(write_recipe(settings(corpus, tmp_path / name, LONG), tmp_path / f"{name}.toml"))
        for name in ("whole", "run")
    ]
    with job(tmp_path / "whole.log", *TRAIN, recipes[0], ranks=ranks) as whole:
        assert whole.status(300) == 0, whole.log.read_text()

    seed = random.randrange(10**6)
    print("moments are of seed", seed)
    chooser, folder, command = random.Random(seed), tmp_path / "run", recipes[1]
    for kill in range(KILLS):
        moment = MOMENTS[kill % len(MOMENTS)]
        program = (SLOW_SAVE, f"{chooser.random() / 5}") if moment == "saving" else TRAIN
        with ExitStack() as stack:
            logs = [tmp_path / f"{kill}.{number}.log" for number in range(2 if "two" in moment else 1)]
            launched = [stack.enter_context(job(log, *program, command, ranks=ranks)) for log in logs]
            if moment == "two at once":  # one of them trains, the other is told so
                deadline = time.monotonic() + 90
                while all(one.process.poll() is None for one in launched) and time.monotonic() < deadline:
                    time.sleep(0.01)
                (refused,) = (one for one in launched if one.process.poll() is not None)
                assert refused.process.returncode == 1 and "another run writes there" in refused.log.read_text()
                launched.remove(refused)
            wait_for(launched[0], folder, moment, chooser)
            assert any(one.process.poll() is None for one in launched), [one.log.read_text() for one in launched]
            for one in launched:
                one.kill()
        print(f"kill {kill + 1} while {moment}: {reached(folder)} steps saved")
    assert 0 < reached(folder) < STEPS

    with job(tmp_path / "last.log", *TRAIN, command, ranks=ranks) as last:
        assert last.status(300) == 0, last.log.read_text()
    never_killed = Result(read_lines(tmp_path / "whole"), {}, {}, {}, None, 0, [])
    assert len(never_killed.lines) == STEPS
    expect_same_bits(folder, never_killed)
    expected, found = (tensors(tmp_path / name / f"checkpoints/step-{STEPS}") for name in ("whole", "run"))
    assert expected.keys() == found.keys() and any(key.startswith("optimizer.") for key in found)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert not (folder / "run.lock").exists()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [f"step-{STEPS - 4}", f"step-{STEPS}"]
