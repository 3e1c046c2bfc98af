"""The folder of a run's checkpoints: what its names mean, and the renames that keep it valid at every instant.

    step-400.tmp      being written, or left by a run that was killed: never read
    step-300          a complete checkpoint
    step-300.old      the former step-300 while a new one takes its name: read if there is no step-300
    step-100.trash    being deleted: never read

A checkpoint becomes visible by one rename after all its bytes are on disk, and leaves by one rename before the first
byte is deleted. So a process killed anywhere leaves every name with its meaning.

`state.json` carries a serial number that grows with every save of the folder. The newest checkpoint is the one saved
last, not the one with the highest step: a run resumed from step 100 makes its step 150 newer than a step 300 of the run
it left behind. Only one process writes a folder (rank 0); nothing here communicates.
"""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from torchlinearmoe.checkpoint.aside import sync
from torchlinearmoe.checkpoint.plain import read_plain
from torchlinearmoe.checkpoint.storage import METADATA_FILE, CheckpointError, missing_data, read_metadata
from torchlinearmoe.errors import UserError, visible

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
STEP_NAME = re.compile(r"step-(\d+)(\.old)?")


class State(NamedTuple):
    """What `state.json` holds.

    Attributes:
        step: optimizer steps taken.
        serial: number of this save within its folder.
        without_optimizer_state: parameters that the optimizer knew but held nothing for; None when no optimizer
            was saved.
        extra: what the caller handed over.
    """

    step: int
    serial: int
    without_optimizer_state: list[str] | None
    extra: dict[str, Any]


def read_state(path: Path) -> State:
    """The `State` of the checkpoint ``path``.

    Raises:
        CheckpointError: `state.json` is missing or not what a save writes.
    """
    try:
        state = State(**json.loads(read_plain(path, STATE_FILE)))
        if not isinstance(state.step, int) or not isinstance(state.serial, int) or not isinstance(state.extra, dict):
            raise TypeError("step and serial must be numbers, extra an object")
        return state
    except UserError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot read {STATE_FILE} ({one_line(error)})") from None


def read_extra(path: str | Path) -> dict[str, Any]:
    """The ``extra`` given to the save of the checkpoint ``path``, with its ``step``; reads no tensors.

    Raises:
        CheckpointError: ``path`` is not a checkpoint.
    """
    state = read_state(Path(path))
    return state.extra | {"step": state.step}


def read_file(path: str | Path, name: str) -> bytes:
    """The contents of the file ``name`` (e.g. ``recipe.toml``) inside the checkpoint ``path``.

    Raises:
        CheckpointError: there is no such file.
    """
    try:
        return read_plain(path, name)
    except UserError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot read {name} ({error.strerror})") from None


def snapshot(extra: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of ``extra`` as JSON keeps it (tuples become lists, keys strings).

    Raises:
        CheckpointError: ``extra`` holds something that JSON does not.
    """
    try:
        return json.loads(json.dumps(extra))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"extra must hold only what JSON does: {error}") from None


def check_file_names(files: Mapping[str, str | bytes]) -> None:
    """Refuse names of ``files`` that would leave the checkpoint or collide with its own.

    Raises:
        CheckpointError: naming the file.
    """
    for name in files:
        path = PurePosixPath(name)
        own = name in (STATE_FILE, METADATA_FILE) or path.suffix == ".distcp"
        if own or not path.parts or path.is_absolute() or ".." in path.parts:
            raise CheckpointError(f"files: '{name}' is not a free name inside a checkpoint")


def one_line(error: BaseException) -> str:
    """The message of ``error`` on one line, with its type."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def problem(path: Path) -> str | None:
    """Why the checkpoint ``path`` is not complete, or None if it is."""
    try:
        read_state(path)
        return missing_data(path, read_metadata(path))
    except CheckpointError as error:
        return str(error).removeprefix(f"checkpoint {path}: ")


def _complete(directory: Path, *, aloud: bool) -> list[Path]:
    """The complete checkpoints of ``directory``, oldest first; ``aloud`` logs a line for each incomplete one."""
    found: list[tuple[int, Path]] = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        why = None
        if match := STEP_NAME.fullmatch(path.name):
            if match[2] and path.with_suffix("").exists():
                continue
            why = problem(path)
            if why is None:
                found.append((read_state(path).serial, path))
        elif path.suffix == ".tmp" and STEP_NAME.fullmatch(path.stem):
            why = "its save never finished"
        if why and aloud:
            logger.warning("skipping incomplete checkpoint %s: %s", visible(str(path)), visible(why))
    return [path for _, path in sorted(found)]


def find_latest(directory: str | Path) -> Path | None:
    """The complete checkpoint of ``directory`` saved last, or None; logs a one-line warning for each it skips."""
    complete = _complete(Path(directory), aloud=True)
    return complete[-1] if complete else None


def is_used(directory: Path) -> bool:
    """Whether ``directory`` holds any checkpoint, complete or not."""
    return directory.is_dir() and any(path.name.startswith("step-") for path in directory.iterdir())


def prepare(directory: Path, step: int) -> tuple[Path, int]:
    """Make the empty folder that the save of ``step`` writes into; returns it and the serial of the save.

    First undoes a replacement that was cut short: a `step-N.old` gets its name back unless a step-N exists.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("step-*.old"):
        if old.with_suffix("").exists():
            _delete(old)
        else:
            old.rename(old.with_suffix(""))
    complete = _complete(directory, aloud=False)
    temporary = directory / f"step-{step}.tmp"
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    return temporary, 1 + (read_state(complete[-1]).serial if complete else 0)


def publish(temporary: Path, files: Mapping[str, str | bytes], state: State) -> Path:
    """Complete ``temporary``, whose tensors are written, with ``files`` and ``state``, and give it its name.

    Raises:
        CheckpointError: data that the ranks report as written is not there (a folder not shared by all nodes).
    """
    contents = {name: data.encode() if isinstance(data, str) else data for name, data in files.items()}
    contents[STATE_FILE] = json.dumps(state._asdict(), indent=1).encode()
    for name, data in contents.items():
        path = temporary / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            stream.write(data)
    if why := problem(temporary):
        raise CheckpointError(f"{why}; do all nodes share the folder {temporary.parent}?")
    for path in [*temporary.rglob("*"), temporary]:
        if path.suffix != ".distcp":  # those are synced by the rank that wrote them
            sync(path)

    final = temporary.with_suffix("")
    if final.exists():
        old = final.with_suffix(".old")
        final.rename(old)
        temporary.rename(final)
        sync(final.parent)
        _delete(old)
    else:
        temporary.rename(final)
        sync(final.parent)
    return final


def retain(directory: Path, keep: int) -> None:
    """Delete all but the ``keep`` complete checkpoints saved last, and what killed runs left behind."""
    for path in _complete(directory, aloud=False)[:-keep]:
        _delete(path)
    for path in directory.glob("step-*"):
        if path.suffix in (".tmp", ".trash"):
            shutil.rmtree(path)


def _delete(path: Path) -> None:
    trash = path.with_suffix(".trash")
    if trash.exists():
        shutil.rmtree(trash)
    path.rename(trash)
    shutil.rmtree(trash)
