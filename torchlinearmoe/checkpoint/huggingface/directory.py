"""A Hugging Face directory as it lies on disk: `config.json` and safetensors files, whole before anything is read.

config.json
model.safetensors            one file, or
model.safetensors.index.json and the files it names
tokenizer.json and more      see `tokenizer_files.PATTERNS`
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchlinearmoe.checkpoint.boxes import Index, slices
from torchlinearmoe.checkpoint.plain import is_there, plain_file, read_plain
from torchlinearmoe.errors import UserError

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of `config.json` and `generation_config.json` that say which ids begin, end and fill a text."""

MAPPED_BYTES = 2**24

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Directory:
    """An open directory; every file is there and its header is sound.

    Raises UserError, one line that names the file: a file that is missing, cut short, not what its name says, or
    holds something else than plain floating-point weights.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_config(self.path)
        self.shapes: dict[str, Index] = {}
        """Of every tensor."""
        self.dtypes: dict[str, torch.dtype] = {}
        self._files: dict[str, str] = {}
        self._kept: tuple[str, Any] = ("", None)
        self._read = 0
        listed = self._listed()
        for file in dict.fromkeys(listed.values()) if listed else [WEIGHTS]:
            self._open(file)
        for name, file in listed.items():
            if name not in self.shapes:
                raise UserError(f"{self.path / file}: holds no '{name}', which {INDEX} says is there")

    def read(self, name: str, start: Index, shape: Index) -> Tensor:
        """A box of a tensor, in the type it is stored in; nothing else is read.

        Only the file of the last tensor is kept mapped, and not for longer than `MAPPED_BYTES` are read of it: what was
        touched of a mapped file counts as memory.
        """
        file = self._files[name]
        if self._kept[0] != file or self._read > MAPPED_BYTES:
            self._kept = ("", None)  # unmapped before the next one is mapped
            self._kept, self._read = (file, _map(self.path / file)), 0
        self._read += math.prod(shape) * self.dtypes[name].itemsize
        mapped = self._kept[1]
        if not shape:
            return mapped.get_tensor(name)
        return mapped.get_slice(name)[slices(start, shape)]

    def _listed(self) -> dict[str, str]:
        """Tensor to file, from the index; empty without one."""
        index = self.path / INDEX
        if not is_there(index):
            if not is_there(self.path / WEIGHTS):
                pickles = sorted(self.path.glob("pytorch_model*.bin"))
                why = f" ({pickles[0].name} is pickled and not read; save it as safetensors)" if pickles else ""
                raise UserError(f"{self.path}: holds neither {WEIGHTS} nor {INDEX}{why}")
            return {}
        found = _read_json(index).get("weight_map")
        if not isinstance(found, dict) or not found or not all(_is_plain(file) for file in found.values()):
            raise UserError(f"{index}: 'weight_map' must name the file of every tensor")
        return found

    def _open(self, file: str) -> None:
        path = self.path / file
        if not is_there(path):
            raise UserError(f"{path}: the file is missing, but {INDEX} names it")
        opened = _map(path)
        for name in list(opened.keys()):
            described = opened.get_slice(name)
            dtype = DTYPES.get(described.get_dtype())
            if dtype is None:
                raise UserError(f"{path}: '{name}' is {described.get_dtype()}; legal: {', '.join(DTYPES)}")
            self.shapes[name], self.dtypes[name] = tuple(described.get_shape()), dtype
            self._files[name] = file


def _map(path: Path) -> Any:
    """An open safetensors file. Raises UserError."""
    plain_file(path.parent, path.name)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a safetensors file, or cut short: {error}") from None


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of the directory `path`. Raises UserError."""
    if not is_there(path / CONFIG):
        raise UserError(f"{path}: holds no {CONFIG}; name a directory that `save_pretrained` wrote")
    config = _read_json(path / CONFIG)
    if config.get("quantization_config"):
        raise UserError(f"{path / CONFIG}: 'quantization_config': quantised weights are not read; dequantise them")
    return config


def read_special_ids(path: Path) -> dict[str, dict[str, Any]]:
    """The `SPECIAL_IDS` that each of the two files of the directory `path` names, by file. Raises UserError."""
    files = [name for name in (CONFIG, GENERATION) if (path / name).is_file()]
    found = {name: _read_json(path / name) for name in files}
    return {name: {key: values[key] for key in SPECIAL_IDS if key in values} for name, values in found.items()}


def is_directory(path: Path) -> bool:
    """Whether `path` looks like a Hugging Face directory."""
    return is_there(path / CONFIG)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_plain(path.parent, path.name))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


def _is_plain(file: object) -> bool:
    return isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")
