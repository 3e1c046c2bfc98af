"""Folders that are there whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchlinearmoe.checkpoint.storage import CheckpointError
from torchlinearmoe.disk import sync


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A folder `PATH.tmp` to write into, which takes its name when the block ends well and is removed when it does not.

    Raises CheckpointError when `path` exists, or for what the disk refuses.
    """
    if path.exists():
        raise CheckpointError(f"{path}: exists already; name a folder that does not, or remove it")
    temporary = path.with_name(path.name + ".tmp")
    try:
        if temporary.exists():  # left by a process that was killed
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        yield temporary
        if temporary.exists():
            for file in [*temporary.rglob("*"), temporary]:
                sync(file)
            temporary.rename(path)
            sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
