"""A published model's tensors under our names, read box by box."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from torchlinearmoe.checkpoint.boxes import Copy, Index, read_box
from torchlinearmoe.checkpoint.huggingface.config import architecture_of, read_recipe
from torchlinearmoe.checkpoint.huggingface.directory import CONFIG, Directory
from torchlinearmoe.checkpoint.huggingface.own import ARCHITECTURE, own_copies, own_recipe
from torchlinearmoe.errors import UserError
from torchlinearmoe.families.huggingface import Architecture, Name
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.recipe import ModelRecipe

NOT_READ = re.compile(r".*\.rotary_emb\.inv_freq")
"""Tensors of old directories that hold nothing learnt."""


def model_shapes(model: ModelRecipe) -> dict[str, Index]:
    """Shape of every parameter and persistent buffer of a model, by name."""
    with torch.device("meta"):
        decoder = Decoder(model)
    return {name: tuple(value.shape) for name, value in decoder.state_dict().items()}


def name_copies(architecture: Architecture, shapes: Mapping[str, Index]) -> dict[str, list[Copy]]:
    """For every tensor of ours, the boxes of it that are tensors of theirs.

    Raises UserError for a tensor that the architecture has no name for.
    """
    patterns = [(re.compile(re.escape(name.ours).replace(r"\{layer\}", r"(\d+)")), name) for name in architecture.names]
    copies: dict[str, list[Copy]] = {}
    for ours, shape in shapes.items():
        found: list[Copy] = []
        for pattern, name in patterns:
            if match := pattern.fullmatch(ours):
                theirs = name.theirs.replace("{layer}", match[1] if match.groups() else "")
                found += _parts(name, theirs, shape)
        if not found:
            raise UserError(f"{architecture.name} has no tensor for '{ours}'")
        copies[ours] = found
    return copies


def _parts(name: Name, theirs: str, shape: Index) -> Iterator[Copy]:
    """The copies that one name stands for."""
    if "{expert}" not in theirs:
        yield Copy(theirs, (0,) * len(shape), shape, (0,) * len(shape))
        return
    experts, inputs, outputs = shape
    start = 0
    if name.part != "whole":
        outputs //= 2
        start = outputs if name.part == "up" else 0
    for expert in range(experts):
        path = theirs.replace("{expert}", str(expert))
        yield Copy(path, (expert, 0, start), (1, inputs, outputs), (0, 0), expert=True)


class PublishedWeights:
    """A Hugging Face directory as a model of ours: its recipe, and its tensors by our names.

    Raises UserError, one line that names the file, key or tensor: whatever `Directory` raises, an unknown
    architecture, a tensor that is missing, of another shape, or that the architecture does not have.
    """

    def __init__(self, path: str | Path) -> None:
        self.directory = Directory(path)
        self.path = self.directory.path
        config = self.directory.config
        own = config.get("architectures") == [ARCHITECTURE]
        self.recipe = own_recipe(self.path / CONFIG, config) if own else read_recipe(self.path, config)
        self._check_size(published=not own)
        self.shapes = model_shapes(self.recipe.model)
        if own:
            self.copies = own_copies(self.shapes)
        else:
            self.copies = name_copies(architecture_of(self.path, config)[1], self.shapes)
        self._check()
        self.dtypes = {name: self._dtype(copies) for name, copies in self.copies.items()}

    def read(self, name: str, start: Index, shape: Index) -> Tensor:
        """A box of our tensor `name`, in the directory's type."""
        return read_box(self.copies[name], start, shape, self.dtypes[name], self.directory.read)

    def _dtype(self, copies: list[Copy]) -> torch.dtype:
        """A type that holds every part of a tensor."""
        first, *others = {self.directory.dtypes[copy.source] for copy in copies}
        for other in others:
            first = torch.promote_types(first, other)
        return first

    def _check_size(self, *, published: bool) -> None:
        """Refuse a model of more layers and experts than there are tensors, before it is described tensor by tensor."""
        model, found = self.recipe.model, len(self.directory.shapes)
        least, keys = model.num_layers, f"model.num_layers = {model.num_layers}"
        if published and model.moe.num_experts:
            least += (model.num_layers - model.moe.first_dense_layers) * model.moe.num_experts
            keys += f" and moe.num_experts = {model.moe.num_experts}"
        if least > found:
            raise UserError(f"{self.path / CONFIG}: {keys} take at least {least} tensors, the directory has {found}")

    def _check(self) -> None:
        found = self.directory.shapes
        wanted = {copy.source: copy.source_shape for copies in self.copies.values() for copy in copies}
        for name, shape in wanted.items():
            if name not in found:
                raise UserError(f"{self.path}: the tensor '{name}' is missing")
            if found[name] != shape:
                raise UserError(
                    f"{self.path}: '{name}' has shape {list(found[name])}, by config.json it should be {list(shape)}"
                )
        tied = {"lm_head.weight"} if self.recipe.model.tie_embeddings else set()
        surplus = sorted(name for name in found if name not in wanted and name not in tied)
        surplus = [name for name in surplus if not NOT_READ.fullmatch(name)]
        if surplus:
            raise UserError(f"{self.path}: holds '{surplus[0]}', which no model of its config.json has")
