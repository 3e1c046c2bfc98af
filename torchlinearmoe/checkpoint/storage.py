"""The tensor files of a checkpoint: torch's distributed checkpoint format, read without trusting it.

A checkpoint holds tensors only, which torch reads with ``weights_only=True``. The format's index, `.metadata`, is a
pickle; it is read here by an unpickler that knows the few classes such an index is made of and refuses any other.
"""

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from torchlinearmoe.errors import UserError

METADATA_FILE = ".metadata"

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


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
        return super().find_class(module, name)


def read_metadata(path: Path) -> Metadata:
    """The index of the checkpoint ``path``.

    Raises:
        CheckpointError: it is missing or not an index; such a checkpoint is incomplete.
    """
    try:
        with (path / METADATA_FILE).open("rb") as stream:
            metadata = _IndexUnpickler(stream).load()
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path}: no {METADATA_FILE}") from None
    except Exception as error:  # a damaged pickle may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"checkpoint {path}: cannot read {METADATA_FILE} ({reason})") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"checkpoint {path}: {METADATA_FILE} is not an index")
    return metadata


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
        file = path / name
        if not file.is_file():
            return f"no {name}"
        if file.stat().st_size < length:
            return f"{name} has {file.stat().st_size} of {length} bytes"
    return None


class Writer(FileSystemWriter):
    """Writes the tensors of one rank into one file and syncs it.

    The copy-ahead of the base class is off: the tensors are on the CPU already, and it would open a CUDA context on
    device 0 from the saving thread.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync_files=True, per_thread_copy_ahead=0)

    def storage_meta(self) -> StorageMeta | None:
        """Nothing: the path of the temporary folder says nothing to a reader, and a path is no index class."""
        return None


class StreamWriter(Writer):
    """Holds one tensor at a time, where the base class holds all that it has written into a file."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write each item as soon as the planner has made it."""
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        results = []
        with (Path(self.path) / name).open("wb") as stream:
            for item in plan.items:
                start = stream.tell()
                torch.save(_compact(planner.resolve_data(item)), stream)
                length = stream.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
            os.fsync(stream.fileno())
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _compact(tensor: Any) -> Tensor:
    """The tensor without what else lies in its storage."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


class Reader(FileSystemReader):
    """Reads tensors by an index that was read before, see `read_metadata`."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index given to the constructor."""
        return self._metadata
