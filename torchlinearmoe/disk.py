"""What a disk refuses: no room, a quota, a limit on files, a failing device; told in one line with a way out."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torchlinearmoe.errors import UserError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
REFUSALS = FULL | {
    *(errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ESTALE),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
}


def refusal(error: BaseException | None) -> OSError | None:
    """What of an error, of its cause or of what it came on top of, the disk said; None for nothing."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in REFUSALS:
            return error
        error = error.__cause__ or error.__context__
    return None


def told(error: OSError) -> str:
    """The reason, with the file where it is known."""
    reason = os.strerror(error.errno or errno.EIO)
    return f"{error.filename}: {reason}" if error.filename else reason


def expanded(path: str | Path, key: str) -> Path:
    """A path with `~` and `~user` written out. Raises UserError that names `key` where that user has no home here."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{key} = '{path}': there is no such home here; write the whole path") from None


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def one_line(where: str, way_out: Callable[[], str]) -> Iterator[None]:
    """Turn what the disk refuses inside into a UserError `WHERE: REASON; WAY OUT`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found = refusal(error)
        if found is None:
            raise
        raise UserError(f"{where}: {told(found)}; {way_out()}") from None
