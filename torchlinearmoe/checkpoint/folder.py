"""The folder of a run's checkpoints: what its names mean, and the renames that keep it valid at every instant.

    step-400.tmp      being written, or left by a run that was killed: never read
    step-300          a complete checkpoint
    step-300.old      the former step-300 while a new one takes its name: read if there is no step-300
    step-100.trash    being deleted: never read
    step-100.stray    a file or link that lay where step-100 was to appear: never read

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
from collections.abc import Callable, Mapping, Set
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from torchlinearmoe.checkpoint.plain import is_there, read_plain
from torchlinearmoe.checkpoint.storage import METADATA_FILE, CheckpointError, missing_data, read_metadata
from torchlinearmoe.checkpoint.sums import Sums, changed, changed_archive, share_out, sum_file, sum_table
from torchlinearmoe.disk import sync
from torchlinearmoe.errors import UserError, visible

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
OWN_SUM = "crc32"
"""In `state.json`: of all else that it says."""
STEP_NAME = re.compile(r"step-(\d+)(\.old)?")


class State(NamedTuple):
    """What `state.json` holds.

    Attributes:
        step: optimizer steps taken.
        serial: number of this save within its folder.
        without_optimizer_state: parameters that the optimizer knew but held nothing for; None when no optimizer
            was saved.
        extra: what the caller handed over.
        sums: of every other file of the checkpoint; None in those of earlier versions.
    """

    step: int
    serial: int
    without_optimizer_state: list[str] | None
    extra: dict[str, Any]
    sums: Sums | None = None


def read_state(path: Path) -> State:
    """The `State` of the checkpoint ``path``.

    Raises:
        CheckpointError: `state.json` is missing, damaged, or not what a save writes.
    """
    try:
        table = json.loads(read_plain(path, STATE_FILE))
        own = table.pop(OWN_SUM, None)
        state = State(**table)
        if not isinstance(state.step, int) or not isinstance(state.serial, int) or not isinstance(state.extra, dict):
            raise TypeError("step and serial must be numbers, extra an object")
        without = state.without_optimizer_state
        if without is not None and not (isinstance(without, list) and all(isinstance(name, str) for name in without)):
            raise TypeError("without_optimizer_state must be a list of names")
        _check_sums(state.sums)
        if own != (None if state.sums is None else sum_table(table)):
            raise ValueError("its checksum is not the one that was saved")
        return state
    except UserError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot read {STATE_FILE} ({one_line(error)})") from None


def _check_sums(sums: Any) -> None:
    """Raise TypeError for what is not `State.sums`."""
    if sums is None:
        return
    if not isinstance(sums, dict):
        raise TypeError("sums must be an object")
    for entry in sums.values():
        if not (isinstance(entry, list) and len(entry) == 2 and all(type(number) is int for number in entry)):
            raise TypeError("sums must hold [bytes, CRC-32] by file")


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


def damage(path: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """What of the complete checkpoint ``path`` is not as it was saved, as a short text, or None.

    ``rank`` of ``ranks`` compares its share of the files; all of them together, every file.
    """
    try:
        state = read_state(path)
        if state.sums is not None:
            names = share_out(state.sums, rank, ranks)
            return next(filter(None, (changed(path, name, state.sums[name]) for name in names)), None)
        metadata = read_metadata(path)
        files = sorted({info.relative_path for info in metadata.storage_data.values()})[rank::ranks]
        return next(filter(None, (changed_archive(path, name, metadata) for name in files)), None)
    except CheckpointError as error:
        return str(error).removeprefix(f"checkpoint {path}: ")


class Candidates(NamedTuple):
    """What lies in a folder of checkpoints."""

    complete: list[Path]
    """Newest first."""
    skipped: list[str]
    """`incomplete checkpoint PATH: why`."""


def candidates(directory: Path) -> Candidates:
    """The complete checkpoints of ``directory``, and the others."""
    found: list[tuple[int, Path]] = []
    skipped: list[str] = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        why = None
        if match := STEP_NAME.fullmatch(path.name):
            if match[2] and path.with_suffix("").is_dir():
                continue
            why = problem(path)
            if why is None:
                found.append((read_state(path).serial, path))
        elif path.suffix == ".tmp" and STEP_NAME.fullmatch(path.stem):
            why = "its save never finished"
        if why:
            skipped.append(f"incomplete checkpoint {path}: {why}")
    return Candidates([path for _, path in sorted(found, reverse=True)], skipped)


def newest_sound(found: Candidates, damage: Callable[[Path], str | None], *, aloud: bool = True) -> Path | None:
    """The first of ``found`` that ``damage`` finds nothing wrong with; ``aloud`` logs a line for each one skipped."""
    skipped, sound = list(found.skipped), None
    for path in found.complete:
        why = damage(path)
        if why is None:
            sound = path
            break
        skipped.append(f"damaged checkpoint {path}: {why}")
    for line in skipped if aloud else []:
        instead = f"{sound.name} is taken instead" if sound else "there is no other to take instead"
        logger.warning("skipping %s; %s", visible(line), instead)
    return sound


def find_latest(directory: str | Path) -> Path | None:
    """The sound checkpoint of ``directory`` saved last, or None; logs a one-line warning for each it skips."""
    return newest_sound(candidates(Path(directory)), damage)


def is_used(directory: Path) -> bool:
    """Whether ``directory`` holds any checkpoint, complete or not."""
    return directory.is_dir() and any(path.name.startswith("step-") for path in directory.iterdir())


def prepare(directory: Path, step: int) -> tuple[Path, int]:
    """Make the empty folder that the save of ``step`` writes into; returns it and the serial of the save.

    First undoes a replacement that was cut short: a `step-N.old` gets its name back unless a step-N exists.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("step-*.old"):
        _make_way(old.with_suffix(""))
        if old.with_suffix("").exists():
            _delete(old)
        else:
            old.rename(old.with_suffix(""))
    complete = candidates(directory).complete
    temporary = directory / f"step-{step}.tmp"
    _remove(temporary)
    temporary.mkdir()
    return temporary, 1 + (read_state(complete[0]).serial if complete else 0)


def publish(temporary: Path, files: Mapping[str, str | bytes], state: State, sums: Sums) -> Path:
    """Complete ``temporary``, whose tensors are written, with ``files`` and ``state``, and give it its name.

    ``sums``: of what the ranks wrote. Raises CheckpointError when data that they report as written is not there (a
    folder not shared by all nodes).
    """
    sums = dict(sums)
    for name, content in files.items():
        _write(temporary / name, content.encode() if isinstance(content, str) else content)
        sums[name] = sum_file(temporary / name)
    table = state._replace(sums=sums)._asdict()
    table[OWN_SUM] = sum_table(table)
    _write(temporary / STATE_FILE, json.dumps(table, indent=1).encode())
    if why := problem(temporary):
        raise CheckpointError(f"{why}; do all nodes share the folder {temporary.parent}?")
    for path in [*temporary.rglob("*"), temporary]:
        if path.suffix != ".distcp":  # those are synced by the rank that wrote them
            sync(path)

    final = temporary.with_suffix("")
    _make_way(final)
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


def retain(directory: Path, keep: int, damaged: Set[Path] = frozenset()) -> None:
    """Delete all but the ``keep`` complete checkpoints saved last, and what killed runs left behind.

    Those that are known to be ``damaged`` neither count nor go.
    """
    for path in [path for path in candidates(directory).complete if path not in damaged][keep:]:
        _delete(path)
    clear(directory)


def clear(directory: Path) -> None:
    """Delete what killed runs left behind: saves that never finished and checkpoints half deleted."""
    for path in directory.glob("step-*"):
        if path.suffix in (".tmp", ".trash"):
            _remove(path)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _make_way(path: Path) -> None:
    """Rename what lies where a checkpoint belongs and is no folder."""
    if is_there(path) and (path.is_symlink() or not path.is_dir()):
        stray = path.with_suffix(".stray")
        path.rename(stray)
        logger.warning("%s lies where a checkpoint belongs and is no folder; it is %s now", path, stray.name)


def _delete(path: Path) -> None:
    trash = path.with_suffix(".trash")
    _remove(trash)
    path.rename(trash)
    _remove(trash)


def _remove(path: Path) -> None:
    """Delete what lies at ``path``, if anything: a folder, a file or a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
