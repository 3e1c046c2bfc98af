"""Files of a folder that somebody else may have made: plain ones, inside the folder, of bounded size.

A folder that was downloaded may hold anything under any name. What is read of it is a regular file that lies there:
no pipe or device, which would never end, and no link, which would carry another file of this machine along. The one
exception is how the Hugging Face cache keeps its files:

    models--name/blobs/1f0c...
    models--name/snapshots/REVISION/config.json -> ../../blobs/1f0c...
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from torchlinearmoe.errors import UserError

SMALL = 256 * 2**20
"""Most bytes of a file that is read whole: recipes, configurations, tokenizers."""


def plain_file(root: str | Path, name: str, limit: int | None = None) -> Path:
    """The file `name` of the folder `root`, after looking at it; nothing of it is read.

    limit: most bytes. Raises UserError, one line that names the file and the way out; OSError where there is none.
    """
    root, path = Path(root), Path(root) / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{path}: lies outside of {root}; name a file in it")
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        target = Path(os.path.realpath(path))  # where a link leads to itself, the link
        if not _is_cached(root, target):
            raise UserError(f"{path}: is a link, and links are not followed; put the file itself there")
        found = target.stat()
    elif path.parent.resolve() != root.resolve() / Path(name).parent:
        raise UserError(f"{path}: lies behind a link, and links are not followed; put the file itself there")
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: is no regular file; remove it or put a file there")
    if limit is not None and found.st_size > limit:
        raise UserError(f"{path}: has {found.st_size} bytes, at most {limit} are read; put the right file there")
    return path


def read_plain(root: str | Path, name: str, limit: int = SMALL) -> bytes:
    """The contents of `plain_file`."""
    path = plain_file(root, name, limit)
    # Whatever took its place since then is not waited for, and does not go on for ever.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
        return stream.read(limit)


def is_there(path: Path) -> bool:
    """Whether there is anything of that name, a broken link included."""
    return os.path.lexists(path)


def _is_cached(root: Path, target: Path) -> bool:
    """Whether `target` is a blob of the Hugging Face cache that `root` lies in."""
    folder = root.resolve()
    snapshots = [parent for parent in folder.parents if parent.name == "snapshots"]
    return any(target.parent == parent.parent / "blobs" for parent in snapshots)
