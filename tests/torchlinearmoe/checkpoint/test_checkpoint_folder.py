"""The folder of checkpoints: what counts as complete, what is said of the rest, and a kill at every single step."""

import json
import logging
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import nn

from torchlinearmoe.checkpoint import CheckpointError, CheckpointManager, find_latest, load_model_weights, read_file
from torchlinearmoe.checkpoint.storage import read_metadata


def model_of(value: float) -> nn.Module:
    model = nn.Linear(3, 2)
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


def save(directory: Path, step: int, value: float, keep: int = 9) -> None:
    CheckpointManager(directory, keep).save(step, model_of(value), None, {"value": value}, {"a/b": "x"}, blocking=True)


def value_in(path: Path) -> float:
    """The value that was saved, after a load that must find it in every element and in the extra state."""
    model = model_of(0.0)
    extra = load_model_weights(path, model)
    values = {x for parameter in model.parameters() for x in parameter.flatten().tolist()}
    assert values == {extra["value"]} and read_file(path, "a/b") == b"x"
    return extra["value"]


def rename_to_tmp(path: Path) -> None:
    path.rename(path.with_name(path.name + ".tmp"))


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def overwrite(name: str, data: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / name).write_bytes(data)

    return damage


def change_state(**values: object) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        file = path / "state.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return damage


def cut(name: str) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / name, (path / name).stat().st_size // 2)


@pytest.mark.parametrize(
    "damage, reason",
    [
        (rename_to_tmp, "its save never finished"),
        (remove(".metadata"), "no .metadata"),
        (cut(".metadata"), "cannot read .metadata"),
        (overwrite(".metadata", pickle.dumps({})), ".metadata is not an index"),
        (remove("__0_0.distcp"), "no __0_0.distcp"),
        (cut("__0_0.distcp"), "__0_0.distcp has "),
        (remove("state.json"), "cannot read state.json"),
        (cut("state.json"), "cannot read state.json"),
        (overwrite("state.json", json.dumps({"step": 20}).encode()), "cannot read state.json"),
        (overwrite("state.json", json.dumps([20]).encode()), "cannot read state.json"),
        (overwrite("state.json", b"[" * 100_000), "cannot read state.json"),
        (change_state(sums=3), "cannot read state.json (TypeError: sums must be an object)"),
        (change_state(without_optimizer_state=[1]), "without_optimizer_state must be a list of names"),
        (
            change_state(extra=[]),
            "cannot read state.json (TypeError: step and serial must be numbers, extra an object)",
        ),
    ],
)
def test_an_incomplete_checkpoint_is_skipped_aloud_and_not_touched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], reason: str
) -> None:
    save(tmp_path, 10, 1.0)
    save(tmp_path, 20, 2.0)
    damage(tmp_path / "step-20")
    before = sorted(tmp_path.rglob("*"))
    with caplog.at_level(logging.WARNING, "torchlinearmoe"):
        assert find_latest(tmp_path) == tmp_path / "step-10"
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("torchlinearmoe")]
    assert len(messages) == 1 and "\n" not in messages[0]
    assert messages[0].startswith(f"skipping incomplete checkpoint {tmp_path}/step-20") and reason in messages[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "absent") is None
    (tmp_path / "step-5.trash").mkdir()
    (tmp_path / "notes").mkdir()
    assert find_latest(tmp_path) is None


@pytest.mark.parametrize("damage", [remove(".metadata"), cut("__0_0.distcp"), remove("state.json")])
def test_loading_an_incomplete_checkpoint_is_one_line(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    save(tmp_path, 10, 1.0)
    damage(tmp_path / "step-10")
    with pytest.raises(CheckpointError, match=f"^checkpoint {tmp_path}/step-10: [^\n]*$"):
        load_model_weights(tmp_path / "step-10", model_of(0.0))
    with pytest.raises(CheckpointError, match=f"^checkpoint {tmp_path}/step-11: no .metadata$"):
        load_model_weights(tmp_path / "step-11", model_of(0.0))
    with pytest.raises(CheckpointError, match="step-10: cannot read recipe.toml"):
        read_file(tmp_path / "step-10", "recipe.toml")


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["PAYLOAD_FOLDER"],)


@pytest.mark.parametrize("payload", [Payload(), torch.nn.Linear, os.system])
def test_an_index_that_names_anything_else_is_refused_before_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload: object
) -> None:
    monkeypatch.setenv("PAYLOAD_FOLDER", str(tmp_path / "payload"))
    save(tmp_path, 10, 1.0)
    metadata = read_metadata(tmp_path / "step-10")
    metadata.planner_data = {"x": payload}
    (tmp_path / "step-10/.metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="has no place in a checkpoint"):
        load_model_weights(tmp_path / "step-10", model_of(0.0))
    assert not (tmp_path / "payload").exists()


CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def save_until(kill_at: int, directory: Path, step: int, value: float, keep: int) -> int:
    """Save in a forked process that is killed just before its ``kill_at``-th change of the folder; its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    changes = 0

    def count(event: str, args: tuple) -> None:
        nonlocal changes
        if event in CHANGES and (event != "open" or str(args[0]).startswith(str(directory))):
            changes += 1
            if changes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(count)
        save(directory, step, value, keep)
        os._exit(0)
    finally:
        os._exit(1)


def kill_everywhere(base: Path, work: Path, step: int, keep: int) -> list[float]:
    """Save value 3 as ``step`` over copies of ``base`` (newest: value 2), killed at every change in turn.

    Returns the value found after each kill; checks on the way that the folder recovers.
    """
    logging.disable()
    found = []
    for kill_at in range(1, 500):
        shutil.copytree(base, work)
        status = save_until(kill_at, work, step, 3.0, keep)
        assert status in (0, -signal.SIGKILL), status
        latest = find_latest(work)
        assert latest is not None, f"nothing left after a kill at change {kill_at}"
        found.append(value_in(latest))
        save(work, 50, 4.0, keep)
        newest = find_latest(work)
        assert newest is not None and newest.name == "step-50" and value_in(newest) == 4.0
        names = {path.name for path in work.iterdir()}
        assert len(names) == keep and all(name.removeprefix("step-").isdigit() for name in names), names
        if keep > 1:
            kept = {value_in(work / name) for name in names}
            assert kept == {found[-1], 4.0}, kept
        shutil.rmtree(work)
        if status == 0:
            return found
    raise AssertionError("the save never came to its end")


@pytest.fixture(scope="module")
def quiet_process() -> Iterator[ProcessPoolExecutor]:
    """A process without other threads, safe to fork."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        yield process


@pytest.mark.parametrize("step, keep", [(30, 2), (20, 1)], ids=["a new one", "the only one again"])
def test_a_kill_at_any_step_of_a_save_leaves_the_old_or_the_new(
    tmp_path: Path, quiet_process: ProcessPoolExecutor, step: int, keep: int
) -> None:
    base = tmp_path / "base"
    save(base, 10, 1.0, keep)
    save(base, 20, 2.0, keep)
    found = quiet_process.submit(kill_everywhere, base, tmp_path / "work", step, keep).result()
    assert found == sorted(found) and set(found) == {2.0, 3.0}
    assert found.count(2.0) > 8
