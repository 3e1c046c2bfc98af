"""The tensor files of a checkpoint: torch's distributed checkpoint format, read without trusting it.

A checkpoint holds tensors only, which torch reads with ``weights_only=True``. The format's index, `.metadata`, is a
pickle; it is read here by an unpickler that knows the few classes such an index is made of and refuses any other.
"""

import io
import math
import os
import pickle
import warnings
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.utils.serialization import config

from torchlinearmoe.checkpoint.plain import plain_file, read_plain
from torchlinearmoe.checkpoint.sums import SummedFiles, Sums
from torchlinearmoe.errors import UserError

METADATA_FILE = ".metadata"
LARGEST_INDEX = 2**30
"""Bytes; about 200 a chunk of a tensor."""

_INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read. The message is one line and names the checkpoint and the reason."""


_RECORDS = (
    *(BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta, TensorProperties),
    *(TensorStorageMetadata, _StorageInfo),
)
"""What an index may set attributes of: objects of these very types."""


_Unpickler: Any = pickle._Unpickler
"""The one in C sets attributes of whatever an index tells it to, classes and functions included."""


class _IndexUnpickler(_Unpickler):
    dispatch = dict(_Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
        return super().find_class(module, name)

    def load_build(self) -> None:
        built = self.stack[-2]
        if type(built) not in _RECORDS:
            raise pickle.UnpicklingError(f"attributes of {built!r} have no place in a checkpoint")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def read_metadata(path: Path) -> Metadata:
    """The index of the checkpoint ``path``.

    Raises:
        CheckpointError: it is missing or not an index; such a checkpoint is incomplete.
    """
    try:
        metadata = _IndexUnpickler(io.BytesIO(read_plain(path, METADATA_FILE, LARGEST_INDEX))).load()
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path}: no {METADATA_FILE}") from None
    except UserError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from None
    except pickle.UnpicklingError as error:  # also what it names and may not
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"checkpoint {path}: cannot read {METADATA_FILE} ({reason})") from None
    except Exception:  # a damaged pickle may raise anything
        raise CheckpointError(f"checkpoint {path}: cannot read {METADATA_FILE}: it is damaged") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"checkpoint {path}: {METADATA_FILE} is not an index")
    try:
        _check_index(metadata)
    except Exception as error:  # wrong types in a pickle may raise anything
        raise CheckpointError(f"checkpoint {path}: {METADATA_FILE} is not an index: {error}") from None
    return metadata


def _check_index(metadata: Metadata) -> None:
    """Raise for an index that leaves the checkpoint, or promises more than its files hold."""
    lengths: dict[tuple[str, tuple[int, ...]], int] = {}
    for index, info in metadata.storage_data.items():
        name = info.relative_path
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name or "\0" in name:
            raise ValueError(f"relative_path = {name!r} must be the name of a file in the checkpoint")
        _check_counts(f"offset and length of '{index.fqn}'", (info.offset, info.length))
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"'{index.fqn}' is transformed, and only plain tensors are read")
        lengths[index.fqn, tuple(index.offset or ())] = info.length
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, (TensorStorageMetadata, BytesStorageMetadata)):
            raise TypeError(f"{name!r} is no tensor")
        if isinstance(entry, BytesStorageMetadata):
            continue
        _check_counts(f"the shape of '{name}'", entry.size)
        for chunk in entry.chunks:
            _check_counts(f"a chunk of '{name}'", (*chunk.offsets, *chunk.sizes))
            size = math.prod(chunk.sizes) * entry.properties.dtype.itemsize
            length = lengths.get((name, tuple(chunk.offsets)))
            if length is None or size > length:
                raise ValueError(f"a chunk of '{name}' has {size} bytes, but {length or 0} are written")
        _check_coverage(name, entry)


def _check_coverage(name: str, entry: TensorStorageMetadata) -> None:
    """Raise unless the chunks of a tensor are all of it, every element once."""
    size = tuple(entry.size)
    boxes = sorted((tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks if math.prod(c.sizes))
    for start, shape in boxes:
        if len(start) != len(size) or len(shape) != len(size) or any(s + n > m for s, n, m in zip(start, shape, size)):
            raise ValueError(f"a chunk of '{name}' lies outside of it")
    if sum(math.prod(shape) for _, shape in boxes) < math.prod(size):
        raise ValueError(f"the chunks of '{name}' leave a hole")
    open_boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []  # those that reach the rows of the next one
    for start, shape in boxes:
        open_boxes = [(s, n) for s, n in open_boxes if not s or s[0] + n[0] > start[0]]
        for other, extent in open_boxes:
            if all(a < b + m and b < a + n for a, n, b, m in zip(start, shape, other, extent)):
                raise ValueError(f"chunks of '{name}' overlap")
        open_boxes.append((start, shape))


def _check_counts(what: str, numbers: Any) -> None:
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{what}: {list(numbers)!r} must be whole numbers, none below 0")


def expect_one_process() -> None:
    """Let torch save and load without a group in silence: it warns of each time, and here it is no accident.

    Left on: `warnings.catch_warnings` puts back the filters of all threads, and the saving thread has no right to.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def missing_data(path: Path, metadata: Metadata) -> str | None:
    """What of the data listed in ``metadata`` is not in ``path``, as a short text, or None if all of it is."""
    lengths: dict[str, int] = {}
    for info in metadata.storage_data.values():
        lengths[info.relative_path] = max(lengths.get(info.relative_path, 0), info.offset + info.length)
    for name, length in lengths.items():
        try:
            size = plain_file(path, name).stat().st_size
        except OSError:
            return f"no {name}"
        except UserError as error:
            return str(error)
        if size < length:
            return f"{name} has {size} of {length} bytes"
    return None


class Writer(FileSystemWriter):
    """Writes the tensors of one rank into one file, sums it and syncs it.

    The copy-ahead of the base class is off: the tensors are on the CPU already, and it would open a CUDA context on
    device 0 from the saving thread.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync_files=True, per_thread_copy_ahead=0)
        self.fs = self._files = SummedFiles()

    @property
    def sums(self) -> Sums:
        """Of what this rank has written."""
        return self._files.sums

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the plan's items, without the sum that torch would put beside ours."""
        with config.patch({"save.compute_crc32": False}):  # pyright: ignore[reportAttributeAccessIssue]
            return super().write_data(plan, planner)

    def storage_meta(self) -> StorageMeta | None:
        """Nothing: the path of the temporary folder says nothing to a reader, and a path is no index class."""
        return None


class StreamWriter(Writer):
    """Holds one tensor at a time, where the base class holds all that it has written into a file."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write each item as soon as the planner has made it, with torch's sums too: no time is lost by them here."""
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        results = []
        with self._files.create_stream(Path(self.path) / name, "wb") as stream:
            for item in plan.items:
                start = stream.tell()
                torch.save(_compact(planner.resolve_data(item)), cast(IO[bytes], stream))
                length = stream.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
            os.fsync(stream.fileno())
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _compact(tensor: Any) -> Tensor:
    """The tensor without what else lies in its storage."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


class CheckpointReader(FileSystemReader):
    """Reads tensors by an index that was read before, see `read_metadata`."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index given to the constructor."""
        return self._metadata
