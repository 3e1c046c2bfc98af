"""Checksums of a checkpoint's files: taken while they are written, compared before anything of them is used.

    writing    each rank       tensors -> torch.save -> SummedFiles -> its own file; size and CRC-32 to rank 0
               rank 0          state.json: {file: [size, CRC-32]} of every other file, and a CRC-32 of itself
    reading    ranks together  each compares its share of the files; one verdict for all

The sum of a tensor file takes the place of the one that `torch.save` puts into its archive and nobody compares, so
saving takes no longer. Checkpoints without sums come from earlier versions: of them the archives' own are compared.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.filesystem import FileSystem

from torchlinearmoe.checkpoint.plain import plain_file
from torchlinearmoe.errors import UserError

Sums = dict[str, list[int]]
"""[bytes, CRC-32] by the name of a file."""
PIECE = 2**24
"""Bytes read at once."""


class SummedFiles(FileSystem):
    """The files that a save writes, summed as they are written."""

    def __init__(self) -> None:
        self.sums: Sums = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        """As the base class; what is written is summed."""
        summed = None
        try:
            with super().create_stream(path, mode) as stream:
                summed = _Summed(cast(BinaryIO, stream))
                yield summed
        except Exception:
            if summed is not None and summed.refused is not None:
                raise summed.refused from None  # torch's archive would say that it lost its place
            raise
        self.sums[Path(path).name] = [summed.size, summed.crc]

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        """As the base class."""
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class _Summed(io.RawIOBase):
    """A file that is written from its beginning to its end."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.size = self.crc = 0
        self.refused: OSError | None = None
        """What the disk said to the first write that failed."""

    def write(self, data: Any) -> int:
        self.crc = zlib.crc32(data, self.crc)
        self.size += memoryview(data).nbytes
        try:
            return self._stream.write(data)
        except OSError as error:
            self.refused = self.refused or error
            raise

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        if not self._stream.closed:
            self._stream.flush()

    def fileno(self) -> int:
        self.flush()
        return self._stream.fileno()


def sum_file(path: Path) -> list[int]:
    """[bytes, CRC-32] of a file."""
    size = crc = 0
    with path.open("rb") as stream:
        while data := stream.read(PIECE):
            size, crc = size + len(data), zlib.crc32(data, crc)
    return [size, crc]


def sum_table(table: Mapping[str, Any]) -> int:
    """CRC-32 of what a JSON object says, however it is laid out."""
    return zlib.crc32(json.dumps(table).encode())


def share_out(sums: Sums, rank: int, ranks: int) -> list[str]:
    """The files that `rank` compares: about as many bytes as every other."""
    return sorted(sums, key=lambda name: (-sums[name][0], name))[rank::ranks]


def changed(path: Path, name: str, expected: list[int]) -> str | None:
    """How the file `name` of the checkpoint `path` differs from what was saved, or None; a short text."""
    try:
        file = plain_file(path, name)
        size = file.stat().st_size
        if size != expected[0]:
            return f"{name} has {size} of {expected[0]} bytes"
        return None if sum_file(file) == expected else f"{name} is damaged: its checksum is not the one that was saved"
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"cannot read {name} ({error.strerror})"


def changed_archive(path: Path, name: str, metadata: Metadata) -> str | None:
    """The same for a tensor file of a checkpoint without sums, by those in its archives."""
    try:
        with plain_file(path, name).open("rb") as stream:
            for index, info in metadata.storage_data.items():
                if info.relative_path != name:
                    continue
                stream.seek(info.offset)
                with zipfile.ZipFile(io.BytesIO(stream.read(info.length))) as archive:
                    if archive.testzip() is not None:
                        return f"{name} is damaged: the checksum of '{index.fqn}' is not the one that was saved"
    except Exception as error:  # a damaged archive may raise anything
        return f"{name} is damaged ({' '.join(f'{type(error).__name__}: {error}'.split())})"
    return None
