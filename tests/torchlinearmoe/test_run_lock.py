"""Who may write into a run's folder, by what stands in its lock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.run_lock import LOCK_FILE, Owner, release, take


def write(folder: Path, owner: Owner) -> None:
    folder.mkdir()
    (folder / LOCK_FILE).write_text(json.dumps(asdict(owner)))


def owner_of(folder: Path) -> Owner:
    return Owner(**json.loads((folder / LOCK_FILE).read_text()))


@pytest.fixture
def other() -> Owner:
    """A process of this host that has ended and nobody has asked after: its id is not given to another yet."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    return replace(Owner.here(), pid=process.pid, started=5)


def test_taken_and_released(tmp_path: Path) -> None:
    own = Owner.here()
    take(tmp_path / "run", own)
    assert owner_of(tmp_path / "run") == own and own.pid == os.getpid()
    release(tmp_path / "run", own)
    assert not list((tmp_path / "run").iterdir())
    release(tmp_path / "run", own)


def test_a_living_owner_is_refused_in_one_line(tmp_path: Path) -> None:
    own = Owner.here()
    take(tmp_path, own)
    with pytest.raises(RecipeError) as caught:
        take(tmp_path, replace(own, pid=own.pid + 1))
    told = f"training.output_dir = '{tmp_path}': another run writes there (process {own.pid} on {own.host}); wait"
    assert str(caught.value).startswith(told) and "\n" not in str(caught.value)
    release(tmp_path, replace(own, pid=own.pid + 1))
    assert owner_of(tmp_path) == own


@pytest.mark.parametrize("gone", ["ended", "later", "rebooted"])
def test_a_dead_owner_s_is_taken_over_aloud(
    gone: str, other: Owner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = Owner.here()
    assert own.started
    dead = {"ended": other, "later": replace(own, started=own.started - 1), "rebooted": replace(own, pid=2**22 + 5)}
    write(tmp_path / "run", dead[gone])
    take(tmp_path / "run", own)
    assert owner_of(tmp_path / "run") == own
    (record,) = caplog.records
    told = f"process {dead[gone].pid} on {own.host} ended without releasing it; taken over"
    assert record.getMessage() == f"{tmp_path / 'run' / LOCK_FILE}: {told}"


def test_another_host_s_is_refused_with_the_file_to_remove(other: Owner, tmp_path: Path) -> None:
    write(tmp_path / "run", replace(other, host="elsewhere"))
    with pytest.raises(RecipeError, match=f"remove {tmp_path}/run/{LOCK_FILE}, else choose"):
        take(tmp_path / "run", Owner.here())
    (tmp_path / "run" / LOCK_FILE).unlink()
    take(tmp_path / "run", Owner.here())


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_launch_that_starts_again_keeps_its_lock(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "17")
    write(tmp_path / "run", replace(Owner.here(), host="elsewhere"))
    with pytest.raises(RecipeError, match="elsewhere"):
        take(tmp_path / "run", Owner.here())
    monkeypatch.setenv(name, "1")
    take(tmp_path / "run", Owner.here())
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun's own word for no id
    write(tmp_path / "two", replace(Owner.here(), host="elsewhere", attempt=[0, 0]))
    with pytest.raises(RecipeError, match="elsewhere"):
        take(tmp_path / "two", Owner.here())


@pytest.mark.parametrize("content", ["x", "[]", '{"pid": 1}', json.dumps(asdict(Owner("h", "1", 1, "", [])))])  # type: ignore[arg-type]
def test_what_is_no_lock_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text(content)
    with pytest.raises(RecipeError, match=f"{LOCK_FILE} is not what a run writes; remove it"):
        take(tmp_path, Owner.here())


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="training.output_dir = '.*file/run': cannot write"):
        take(tmp_path / "file/run", Owner.here())


def test_of_many_at_once_one_gets_it(other: Owner, tmp_path: Path) -> None:
    """Also where a dead one's is there to be taken over. A thread stands for a process: each opens the file anew."""
    for round in range(20):
        folder = tmp_path / str(round)
        if round % 2:
            write(folder, other)

        def try_to_take(number: int, folder: Path = folder) -> bool:
            try:
                take(folder, replace(Owner.here(), launch=str(number)))
                return True
            except RecipeError:
                return False

        with ThreadPoolExecutor(8) as threads:
            assert sum(threads.map(try_to_take, range(8))) == 1
