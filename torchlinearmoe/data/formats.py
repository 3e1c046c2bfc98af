"""Kinds of files and how they are compressed, told by their names: `NAME.jsonl`, `NAME.jsonl.zst`.

A compressed file is read as a stream that ends where its text ends; one that was cut off is an error, not a shorter
text. What the standard library lacks is the extra `data`.
"""

from __future__ import annotations

import bz2
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from torchlinearmoe.errors import UserError

KINDS = (".txt", ".jsonl", ".json", ".parquet")
COMPRESSIONS = (".gz", ".zst", ".bz2")
LEGAL = f"{', '.join(KINDS)}, each also with {', '.join(COMPRESSIONS)}, a pair of .bin and .idx"


def compression_of(path: Path) -> str:
    """`.gz`, `.zst`, `.bz2`, or nothing."""
    return path.suffix if path.suffix in COMPRESSIONS else ""


def kind_of(path: Path) -> str | None:
    """One of KINDS; None for a file that is not read."""
    suffix = path.with_suffix("").suffix if compression_of(path) else path.suffix
    return suffix if suffix in KINDS else None


def optional(module: str, path: Path, what: str) -> Any:
    """A module of the extra `data`. Raises UserError that names the extra."""
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f"{path}: reading {what} needs {package}: pip install torchlinearmoe[data]") from None


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """The bytes of a file, decompressed, and a function that tells how many bytes on disk were read for them.

    Raises UserError for a file that is missing, damaged or cut off, also where that shows only inside the block.
    """
    compression = compression_of(path)
    damaged: tuple[type[BaseException], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    try:
        with path.open("rb") as raw:
            if compression == ".gz":
                text = gzip.GzipFile(fileobj=raw)
            elif compression == ".bz2":
                text = bz2.BZ2File(raw)
                damaged = (EOFError, OSError)
            elif compression == ".zst":
                zstandard = optional("zstandard", path, "zstd")
                damaged = (EOFError, zstandard.ZstdError)
                text = io.BufferedReader(_Zstandard(raw, zstandard), 1 << 20)
            else:
                text, damaged = raw, ()
            yield text, raw.tell  # pyright: ignore[reportReturnType]
    except damaged as error:
        raise UserError(f"{path}: damaged or cut off: {' '.join(str(error).split())}; get the file again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


class _Zstandard(io.RawIOBase):
    """All frames of a zstd file. The package's own reader takes a file that was cut off for one that ends there."""

    def __init__(self, raw: BinaryIO, zstandard: Any) -> None:
        self._raw, self._new = raw, lambda: zstandard.ZstdDecompressor().decompressobj()
        self._frame: Any = None
        self._left, self._text = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            block = self._left or self._raw.read(1 << 17)
            self._left = b""
            if not block:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            self._frame = self._frame or self._new()
            self._text = memoryview(self._frame.decompress(block))
            if self._frame.eof:
                self._left, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._text))
        buffer[:count], self._text = self._text[:count], self._text[count:]
        return count
