"""A checkpoint into a Hugging Face directory.

A model that a published architecture describes is written as that architecture, and transformers loads it by itself.
Any other (linear and hybrid layers, a selection bias, a capacity in evaluation) keeps its own tensor names and comes
with `modeling_torchlinearmoe.py`, which hands the work to the installed torchlinearmoe.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from torchlinearmoe.checkpoint.aside import written_aside
from torchlinearmoe.checkpoint.boxes import Copy, Index, extents, slices
from torchlinearmoe.checkpoint.huggingface.config import architecture_of, write_config
from torchlinearmoe.checkpoint.huggingface.directory import CONFIG, GENERATION, INDEX, WEIGHTS
from torchlinearmoe.checkpoint.huggingface.own import MODELING, float32_names, own_config, own_copies
from torchlinearmoe.checkpoint.huggingface.weights import name_copies
from torchlinearmoe.checkpoint.model import (
    SPECIAL_IDS_FILE,
    TEMPLATE_FILES,
    TOKENIZER_FOLDER,
    checkpoint_template,
    checkpoint_tokenizer,
    read_special_ids,
)
from torchlinearmoe.checkpoint.nonfinite import is_finite, tell_nonfinite
from torchlinearmoe.checkpoint.plain import is_there
from torchlinearmoe.checkpoint.stream import Progress, SavedWeights
from torchlinearmoe.checkpoint.tokenizer_files import CONFIG as TOKENIZER_CONFIG
from torchlinearmoe.checkpoint.tokenizer_files import read_tokenizer_file, tokenizer_names
from torchlinearmoe.checkpoint.tokenizer_json import exported_files, with_template
from torchlinearmoe.data.chat_template import ChatTemplate
from torchlinearmoe.families.huggingface import Config

LAYER = re.compile(r"layers\.\d+\.")
SHARD_BYTES = 5 * 10**9
"""Largest weight file, and about what is held in memory."""


class Part(NamedTuple):
    """A tensor of the directory, put together from boxes of ours."""

    source: str
    shape: Index
    pieces: list[tuple[str, Copy]]
    """Our tensors by name, and which box of each is which box of it."""
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def export_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Config:
    """Write the directory `destination` from the checkpoint `source`; returns its `config.json`.

    dtype: of the weights; None keeps the checkpoint's. In this project's own architecture, what computes in float32
    stays float32. Memory is bounded by a file of `shard_bytes` and one stack of experts. Raises UserError, one line,
    and leaves nothing behind, when `source` is not a complete checkpoint or `destination` exists.
    """
    weights = SavedWeights(source)
    model = weights.recipe.model
    config, kept = write_config(model), set[str]()
    if config is not None:
        architecture = architecture_of(weights.path, config)[1]
        copies = name_copies(architecture, model, weights.shapes)
        kept = {name for name in weights.shapes if LAYER.sub("layers.{layer}.", name) in architecture.float32}
    else:
        config, kept = own_config(weights.recipe), float32_names(model)
        copies = own_copies(weights.shapes)
    types = {name: found if dtype is None or name in kept else dtype for name, found in weights.dtypes.items()}
    parts = _parts(copies, types)
    common = max(set(types.values()), key=lambda kind: sum(part.size for part in parts if part.dtype == kind))
    config |= {"dtype": str(common).removeprefix("torch."), "use_cache": True}
    with written_aside(Path(destination)) as folder:
        _write_small_files(folder, weights, config)
        _write_tensors(folder, weights, _shards(parts, shard_bytes), progress)
    return config


def _parts(copies: Mapping[str, Sequence[Copy]], types: Mapping[str, torch.dtype]) -> list[Part]:
    """The directory's tensors, in the order of ours."""
    shapes = extents(copy for found in copies.values() for copy in found)
    pieces: dict[str, list[tuple[str, Copy]]] = {source: [] for source in shapes}
    for name, found in copies.items():
        for copy in found:
            pieces[copy.source].append((name, copy))
    parts = []
    for source, shape in shapes.items():
        assert sum(math.prod(copy.shape) for _, copy in pieces[source]) == math.prod(shape), f"{source} has a hole"
        kinds = {types[name] for name, _ in pieces[source]}
        parts.append(Part(source, shape, pieces[source], reduce(torch.promote_types, kinds)))
    return parts


def _shards(parts: Sequence[Part], limit: int) -> list[list[Part]]:
    """The parts in order, cut into files of at most `limit` bytes (one part may be larger)."""
    shards: list[list[Part]] = [[]]
    size = 0
    for part in parts:
        if shards[-1] and size + part.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += part.size
    return shards


def _write_tensors(folder: Path, weights: SavedWeights, shards: list[list[Part]], progress: Progress | None) -> None:
    total, done = sum(map(len, shards)), 0
    listed: dict[str, str] = {}
    bad: set[str] = set()
    for number, shard in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name, tensor in _read(weights, shard):
            tensors[name] = tensor
            listed[name] = file
            if not is_finite(tensor):
                bad.add(name)
            done += 1
            if progress is not None:
                progress(done, total)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    tell_nonfinite(weights.path, bad, total)
    if len(shards) > 1:
        size = sum(part.size for shard in shards for part in shard)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(listed.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _read(weights: SavedWeights, parts: Sequence[Part]) -> Iterator[tuple[str, Tensor]]:
    for source, shape, pieces, dtype in parts:
        tensor = torch.empty(shape, dtype=dtype)
        for ours, copy in pieces:
            box = copy.to_source(weights.read(ours, copy.start, copy.shape))
            tensor[slices(copy.source_start, copy.source_shape)] = box
        yield source, tensor


def _ends(checkpoint: Path) -> int | list[int]:
    """The id, or ids, after which generation stops: the end of text, and of a response after finetuning."""
    tokenizer = checkpoint_tokenizer(checkpoint)
    ends = {tokenizer.end_of_text}
    if any((checkpoint / name).is_file() for name in TEMPLATE_FILES.values()):
        ends.add(checkpoint_template(checkpoint).end_id(tokenizer))
    return tokenizer.end_of_text if len(ends) == 1 else sorted(ends)


def _special_ids(checkpoint: Path) -> dict[str, Config]:
    """What each file says of special ids: as they were imported, or as training here used them."""
    if is_there(checkpoint / SPECIAL_IDS_FILE):
        found = read_special_ids(checkpoint)
        ids = found.get(CONFIG, {})
        return {CONFIG: ids, GENERATION: found.get(GENERATION, ids)}
    ids: Config = {}
    if (checkpoint / TOKENIZER_FOLDER).is_dir():
        tokenizer = checkpoint_tokenizer(checkpoint)
        ids = {"bos_token_id": tokenizer.start, "eos_token_id": _ends(checkpoint)}
        if tokenizer.padding is not None:
            ids["pad_token_id"] = tokenizer.padding
    return {CONFIG: ids, GENERATION: ids}


def _learned_template(checkpoint: Path) -> str | None:
    """The Jinja of the chat template that the model was finetuned with; None where it was not."""
    if not any(is_there(checkpoint / name) for name in TEMPLATE_FILES.values()):
        return None
    template = checkpoint_template(checkpoint)
    if isinstance(template, ChatTemplate):
        return template.as_jinja(checkpoint_tokenizer(checkpoint))
    return template.source


def _write_small_files(folder: Path, weights: SavedWeights, config: Config) -> None:
    tokenizer = weights.path / TOKENIZER_FOLDER
    if is_there(tokenizer):
        files = {
            Path(name).name: read_tokenizer_file(weights.path, name)
            for name in tokenizer_names(weights.path, TOKENIZER_FOLDER)
        }
        if files:
            max_length = weights.recipe.model.max_length
            read = checkpoint_tokenizer(weights.path)
            files |= exported_files(read, max_length, files.get(TOKENIZER_CONFIG))
            if (learned := _learned_template(weights.path)) is not None:
                files |= with_template(files[TOKENIZER_CONFIG], learned)
        for name, content in files.items():
            (folder / name).write_bytes(content)
    if "auto_map" in config:
        (folder / MODELING).write_bytes((Path(__file__).parent / MODELING).read_bytes())
    ids = _special_ids(weights.path)
    for name, content in ((CONFIG, config | ids[CONFIG]), (GENERATION, ids[GENERATION])):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
