"""Checkpoints read and written box by box, in memory that does not grow with the model.

`SavedWeights` reads a checkpoint, keeping one tensor at a time; `write_weights` writes one from any source of boxes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, SavePlan
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from torchlinearmoe.checkpoint import folder
from torchlinearmoe.checkpoint.aside import written_aside
from torchlinearmoe.checkpoint.boxes import Copy, Index, read_box, slices
from torchlinearmoe.checkpoint.load import check_fits, describe_failure
from torchlinearmoe.checkpoint.model import checkpoint_recipe
from torchlinearmoe.checkpoint.plain import plain_file
from torchlinearmoe.checkpoint.state import MODEL
from torchlinearmoe.checkpoint.storage import CheckpointError, StreamWriter, expect_one_process, read_metadata
from torchlinearmoe.checkpoint.sums import changed, changed_archive
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.recipe import Recipe

Progress = Callable[[int, int], None]
"""Called with (tensors done, tensors in all)."""


class Weights(Protocol):
    """A model's tensors by their plain names, read box by box."""

    @property
    def path(self) -> Path:
        """Where they lie."""
        ...

    @property
    def recipe(self) -> Recipe:
        """What builds the model."""
        ...

    @property
    def shapes(self) -> Mapping[str, Index]:
        """Shape of every tensor."""
        ...

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Type of every tensor."""
        ...

    def read(self, name: str, start: Index, shape: Index) -> Tensor:
        """A box of a tensor, on the CPU."""
        ...


class SavedWeights:
    """The model's tensors of a complete checkpoint. Raises CheckpointError for any other `path`.

    A file of tensors is compared with its checksum when the first of them is read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if why := folder.problem(self.path):
            raise CheckpointError(f"checkpoint {path}: {why}")
        self.recipe = checkpoint_recipe(self.path)
        with torch.device("meta"):
            check_fits(self.path, Decoder(self.recipe.model))
        self._metadata = read_metadata(self.path)
        self._sums = folder.read_state(self.path).sums
        self._compared = set[str]()
        for name in self._sums or ():
            if not name.endswith(DEFAULT_SUFFIX):
                self._compare(name)
        entries = {
            key.removeprefix(MODEL): entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if key.startswith(MODEL) and isinstance(entry, TensorStorageMetadata)
        }
        self._chunks = {
            name: [Copy(str(i), tuple(c.offsets), tuple(c.sizes), (0,) * len(c.sizes)) for i, c in enumerate(e.chunks)]
            for name, e in entries.items()
        }
        self.shapes = {name: tuple(entry.size) for name, entry in entries.items()}
        self.dtypes = {name: entry.properties.dtype for name, entry in entries.items()}
        self._kept: tuple[str, dict[str, Tensor]] = ("", {})

    def read(self, name: str, start: Index, shape: Index) -> Tensor:
        """A box of the tensor `name`; the chunks of the last tensor asked for are kept."""
        if self._kept[0] != name:
            self._kept = (name, {})

        def read(chunk: str, start: Index, shape: Index) -> Tensor:
            kept = self._kept[1]
            if chunk not in kept:
                kept[chunk] = self._load(name, self._chunks[name][int(chunk)])
            return kept[chunk][slices(start, shape)]

        return read_box(self._chunks[name], start, shape, self.dtypes[name], read)

    def _load(self, name: str, chunk: Copy) -> Tensor:
        file = self.path
        try:
            info: Any = self._metadata.storage_data[MetadataIndex(MODEL + name, torch.Size(chunk.start))]
            self._compare(info.relative_path)
            file = plain_file(self.path, info.relative_path)
            with file.open("rb") as stream:
                stream.seek(info.offset)
                data = io.BytesIO(stream.read(info.length))
            found = torch.load(data, map_location="cpu", weights_only=True)
            if not isinstance(found, Tensor) or (tuple(found.shape), found.dtype) != (chunk.shape, self.dtypes[name]):
                raise ValueError(f"not a tensor of shape {list(chunk.shape)} and of {self.dtypes[name]}")
            return found
        except CheckpointError:
            raise
        except Exception as error:  # a damaged archive may raise anything
            raise CheckpointError(f"{file}: cannot read '{name}' ({folder.one_line(error)})") from None

    def _compare(self, name: str) -> None:
        """Raise CheckpointError when a file is not as it was saved."""
        if name not in self._compared:
            if self._sums is None:
                why = changed_archive(self.path, name, self._metadata)
            elif name in self._sums:
                why = changed(self.path, name, self._sums[name])
            else:
                why = f"{folder.STATE_FILE} has no checksum of {name}"
            if why:
                raise CheckpointError(f"checkpoint {self.path}: {why}")
            self._compared.add(name)


class _Streaming(DefaultSavePlanner):
    """Plans one chunk for each box and reads it when its turn to be written comes."""

    def __init__(self, weights: Weights, boxes: Mapping[str, Sequence[tuple[Index, Index]]], progress: Progress | None):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._weights, self._boxes, self._progress = weights, boxes, progress
        self._total, self._done = sum(map(len, boxes.values())), 0

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, boxes in self._boxes.items():
            size = torch.Size(self._weights.shapes[name])
            properties = TensorProperties(dtype=self._weights.dtypes[name])
            for start, shape in boxes:
                chunk = ChunkStorageMetadata(offsets=torch.Size(start), sizes=torch.Size(shape))
                data = TensorWriteData(chunk=chunk, properties=properties, size=size)
                index = MetadataIndex(MODEL + name, torch.Size(start))
                items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.tensor_data is not None and write_item.tensor_data.chunk is not None
        chunk = write_item.tensor_data.chunk
        name = write_item.index.fqn.removeprefix(MODEL)
        tensor = self._weights.read(name, tuple(chunk.offsets), tuple(chunk.sizes))
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)
        return tensor


def write_weights(
    destination: str | Path,
    weights: Weights,
    boxes: Mapping[str, Sequence[tuple[Index, Index]]],
    files: Mapping[str, str | bytes],
    progress: Progress | None = None,
) -> Path:
    """Write the checkpoint `destination`, without optimizer state; it appears when it is complete.

    boxes: (start, shape) of the pieces each tensor is read and kept in. files: as in `CheckpointManager.save`.
    Raises CheckpointError when `destination` exists or cannot be written; nothing is left behind then.
    """
    path = Path(destination)
    planner = _Streaming(weights, boxes, progress)
    extra = {"tokens": 0, "skipped_steps": 0, "data": {"next_step": 0}}
    with written_aside(path) as temporary:
        try:
            expect_one_process()
            writer = StreamWriter(temporary)
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:  # a BaseException
            raise CheckpointError(f"{path}: cannot be written: {describe_failure(error)}") from None
        folder.publish(temporary, files, folder.State(0, 0, None, extra), writer.sums)
    return path
