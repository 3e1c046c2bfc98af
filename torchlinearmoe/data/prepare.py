"""Files of any size to a folder of token shards, by several processes, in bounded memory.

    plan        the files in units, written down before anything else: a later start goes by it
    shards      each unit by one process at a time, each shard whole or not there
    manifest    when all are there: counts, checksums, summary

Whoever starts it again with the same files and options goes on with the units whose shards are not all there.
"""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchlinearmoe import disk
from torchlinearmoe.data.chat import Chat
from torchlinearmoe.data.prepared import (
    BAD_LINES,
    FORMAT,
    MANIFEST,
    PLAN,
    SHARDS,
    checksum,
    is_complete,
    read_json,
    read_manifest,
    stores_of,
)
from torchlinearmoe.data.records import BadLine
from torchlinearmoe.data.shards import BAD, Job, shards_of, write_unit
from torchlinearmoe.data.store import DESCRIPTION, is_store, remove_orphans
from torchlinearmoe.data.summary import SCRATCH, Summary, count_duplicates
from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.data.units import plan_units
from torchlinearmoe.errors import UserError

SHARD_TOKENS = 1 << 27
"""The default bound of a shard; a document is never cut, and shards end with a batch."""
WORTH_A_WORKER = 1 << 22
"""Bytes of input; for fewer than twice as many no process is started."""
LOCK = ".lock"

Tell = Callable[[int, int], None]
"""Called with (done, total) in bytes of input on disk."""


@dataclass(frozen=True)
class Options:
    """What decides the shards, beside files and tokenizer."""

    text_key: str = "text"
    """Where JSON and parquet have the text."""
    bad_lines: str = "fail"
    """What becomes of lines without a text: `fail`, or `skip` with a report."""
    chat: Chat | None = None
    """How messages are written, where the files hold such."""
    shard_tokens: int = SHARD_TOKENS
    """Tokens after which a shard ends."""
    way_out: str = "make room there, or choose another --output"
    """What an error of the disk ends with."""
    named: Path | None = None
    """The folder that such an error names, in place of the output."""
    waits: bool = False
    """Whether to wait where another process writes the folder, instead of refusing."""


def prepare(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    output: Path,
    options: Options = Options(),
    *,
    workers: int = 1,
    tell: Tell | None = None,
) -> Summary:
    """The tokens of `files` in the folder `output`, by `workers` processes; what is there already is kept.

    Raises UserError, one line: BadLine for one that holds no text, and where the folder was begun from other files or
    with other options, or another process works on it. What was finished by then stays.
    """
    with disk.one_line(f"cannot write tokens to '{options.named or output}'", lambda: options.way_out):
        (output / SHARDS).mkdir(parents=True, exist_ok=True)
        with _alone(output, options.waits):
            _remove_leftovers(output)
            job = _planned(files, tokenizer, output, options)
            if is_complete(output):
                return Summary(**_fields(read_manifest(output)["summary"]))
            todo, done = [], 0
            total = sum(map(job.size, range(len(job.units))))
            for unit in range(len(job.units)):
                *_, (_, last) = shards_of(job, unit)
                if last is None:
                    todo.append(unit)
                else:
                    done += job.size(unit)
            progress = _Progress(done, total, tell)
            count = min(workers, len(todo), (total - done) // WORTH_A_WORKER)
            if count > 1:
                _by_workers(job, todo, tokenizer, count, max(workers // count, 1), progress)
            else:
                tokenizer.threads = max(workers, 1)
                for unit in todo:
                    write_unit(job, unit, tokenizer, progress.add)
            remove_orphans(output / SHARDS)  # workers of a killed start may have lived on for a while
            return _finish(job, tokenizer)


def check(output: Path) -> list[Path]:
    """The shards of a finished folder whose files are not those that the manifest has checksums of."""
    wrong = []
    for shard in read_manifest(output)["shards"]:
        folder = output / SHARDS / shard["name"]
        files = shard["checksums"].items()
        if not all((folder / name).is_file() and checksum(folder / name) == known for name, known in files):
            wrong.append(folder)
    return wrong


def make_again(output: Path, damaged: Sequence[Path]) -> None:
    """Take damaged shards away, so that the next start writes them again."""
    (output / MANIFEST).unlink()
    for folder in damaged:
        shutil.rmtree(folder, ignore_errors=True)


class _Progress:
    def __init__(self, done: int, total: int, tell: Tell | None) -> None:
        self._done, self._total, self._tell = done, total, tell or (lambda done, total: None)
        self.add(0)

    def add(self, count: int) -> None:
        self._done += count
        self._tell(self._done, self._total)


@contextmanager
def _alone(output: Path, waits: bool) -> Iterator[None]:
    """While nobody else writes the folder; a lock ends with its process. Raises UserError instead of waiting."""
    descriptor = os.open(output / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"{output}: another process prepares it; wait for its end") from None
        except OSError:
            pass  # a file system without such locks
        yield
    finally:
        os.close(descriptor)


def _remove_leftovers(output: Path) -> None:
    """Delete what a killed start had not finished beside the shards."""
    for name in (*(f".{whole}.*" for whole in (PLAN, MANIFEST, BAD_LINES)), f"{SCRATCH}*"):
        for left in output.glob(name):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _planned(files: Sequence[Path], tokenizer: Tokenizer, output: Path, options: Options) -> Job:
    """The plan of the folder, written now or before. Raises UserError when the one that is there is another."""
    asked = {
        "format": FORMAT,
        "files": [[str(file.resolve()), state.st_size, state.st_mtime_ns] for file in files for state in [file.stat()]],
        "tokenizer": [tokenizer.fingerprint, tokenizer.begin_of_text],
        "text_key": options.text_key,
        "bad_lines": options.bad_lines,
        "shard_tokens": options.shard_tokens,
    }
    if options.chat is not None:
        asked["messages"] = options.chat.described() | {"names": dict(tokenizer.names)}
    path = output / PLAN
    if path.is_file():
        before = read_json(path).get("asked", {})
        other = [name for name in asked | before if before.get(name) != asked.get(name)]
        if other:
            raise UserError(
                f"{output}: was begun with other {' and '.join(other)}; give the same ones, or choose another folder"
            )
    else:
        if any(name.name != LOCK and name.name != SHARDS for name in output.iterdir()):
            raise UserError(f"{output}: holds something else; choose an empty or new folder")
        units = [[list(piece) for piece in unit] for unit in plan_units(files)]
        _write_json(path, {"asked": asked, "units": units})
    job = Job.read(output)
    return replace(job, way_out=options.way_out, named=options.named)


def _write_json(path: Path, what: dict[str, Any]) -> None:
    """A file that is there whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")
    disk.sync(aside)
    aside.replace(path)
    disk.sync(path.parent)


def _fields(described: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in described.items() if name in Summary.__dataclass_fields__}


def _finish(job: Job, tokenizer: Tokenizer) -> Summary:
    """The manifest of shards that are all there."""
    summary, shards, described = Summary(), [], {}
    aside = job.folder / f".{BAD_LINES}.{os.getpid()}"
    with aside.open("w", encoding="utf-8") as report:
        for unit in range(len(job.units)):
            for folder, known in shards_of(job, unit):
                assert known is not None, folder
                here = Summary(**known["summary"])
                summary.add(here)
                if is_store(folder):
                    described = read_json(folder / DESCRIPTION)
                    counts = {"name": folder.name, "documents": here.documents, "tokens": here.tokens}
                    shards.append(counts | {"checksums": known["checksums"]})
                if here.bad_lines:
                    with (folder / BAD).open(encoding="utf-8") as lines:
                        shutil.copyfileobj(lines, report)
    if summary.bad_lines:
        aside.replace(job.folder / BAD_LINES)
    else:
        aside.unlink()
    if not shards:
        what = "messages" if job.chat else "text"
        where = "" if job.chat else ", or where they keep it (--text-key)"
        raise NoText(f"the files hold no {what}; name files that do{where}")
    store = {name: value for name, value in described.items() if name not in ("documents", "tokens")}
    manifest = {"format": FORMAT, "store": store, "shards": shards}
    if job.chat is not None:
        manifest["messages"] = job.chat.described()
    stores = stores_of(job.folder, manifest)
    summary.duplicates = count_duplicates((store.keys for store in stores), summary.documents, job.folder)
    _write_json(job.folder / MANIFEST, manifest | {"summary": summary.described()})
    return summary


class NoText(UserError):
    """There is nothing in the files."""


def _by_workers(
    job: Job, todo: Sequence[int], tokenizer: Tokenizer, count: int, threads: int, progress: _Progress
) -> None:
    """Hand the units out to processes, the next one to whoever is done. Raises what went wrong in any of them."""
    left = iter(todo)
    waiting = 0
    begins = "begins" if tokenizer.begin_of_text is not None else "plain"
    told = [str(job.folder), str(tokenizer.path), str(threads), begins, tokenizer.fingerprint]
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "torchlinearmoe.data.shards", *told],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # else lines would wait where no selector sees them
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for this process, which ends them
        )
        for _ in range(count)
    ]
    try:
        with selectors.DefaultSelector() as ready:
            for worker in workers:
                assert worker.stdout is not None
                ready.register(worker.stdout, selectors.EVENT_READ, worker)
            waiting = count
            while waiting:
                for event, _ in ready.select(timeout=1):
                    worker: subprocess.Popen[bytes] = event.data
                    assert worker.stdin is not None and worker.stdout is not None
                    line = worker.stdout.readline().decode(errors="replace")
                    kind, _, what = line.rstrip("\n").partition(" ")
                    if kind == "bytes":
                        progress.add(int(what))
                    elif kind in ("ready", "done"):
                        unit = next(left, None)
                        if unit is None:
                            worker.stdin.close()
                            ready.unregister(worker.stdout)
                            waiting -= 1
                        else:
                            worker.stdin.write(f"{unit}\n".encode())
                            worker.stdin.flush()
                    elif kind in ("bad", "error"):
                        raise (BadLine if kind == "bad" else UserError)(what)
                    else:
                        raise _died(worker.wait())
                progress.add(0)
    except BrokenPipeError:
        raise _died(None) from None
    finally:
        for worker in workers:
            if waiting:
                worker.kill()
            for stream in (worker.stdin, worker.stdout):
                with suppress(OSError):
                    assert stream is not None
                    stream.close()
        for worker in workers:
            worker.wait()


def _died(status: int | None) -> UserError:
    told = "" if status is None else f" with status {status}"
    return UserError(
        f"a process that tokenises ended{told} before its work was done, perhaps for want of memory; start again to go "
        "on, with fewer --workers"
    )
