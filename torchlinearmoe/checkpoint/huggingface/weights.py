"""A published model's tensors under our names, read box by box."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from torchlinearmoe.checkpoint.boxes import EXPERT, Copy, Index, extents, read_box
from torchlinearmoe.checkpoint.huggingface.config import architecture_of, read_recipe
from torchlinearmoe.checkpoint.huggingface.directory import CONFIG, Directory
from torchlinearmoe.checkpoint.huggingface.own import ARCHITECTURE, own_copies, own_recipe
from torchlinearmoe.errors import UserError
from torchlinearmoe.families.huggingface import Architecture, Name
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.models.layer_feed_forwards import EXPERTS, NONE, feed_forwards
from torchlinearmoe.models.layer_mixers import layer_mixers
from torchlinearmoe.recipe import ModelRecipe

NOT_READ = re.compile(r".*\.rotary_emb\.inv_freq")
"""Tensors of old directories that hold nothing learnt."""


NUMBER = re.compile(r"\{(layer|mixer|ffn)\}")
"""What stands for a number in names."""


def model_shapes(model: ModelRecipe) -> dict[str, Index]:
    """Shape of every parameter and persistent buffer of a model, by name."""
    with torch.device("meta"):
        decoder = Decoder(model)
    return {name: tuple(value.shape) for name, value in decoder.state_dict().items()}


def name_copies(
    architecture: Architecture,
    model: ModelRecipe,
    shapes: Mapping[str, Index],
    there: Mapping[str, Index] | None = None,
) -> dict[str, list[Copy]]:
    """For every tensor of ours, the boxes of it that are tensors of theirs, or boxes of them.

    there: the shapes of a directory, by whose names one of the architecture's spellings is chosen; None: its first.
    Raises UserError for a tensor that the architecture has no name for.
    """
    spellings = [_patterns(names) for names in (architecture.names, *architecture.spellings)]
    copies: dict[str, list[Copy]] = {}
    for ours in shapes:
        first, *others = ([*_spelled(patterns, ours, shapes, model, there)] for patterns in spellings)
        if there is not None and not _all_there(first, there):
            first = next((other for other in others if _all_there(other, there)), first)
        if not first:
            raise UserError(f"{architecture.name} has no tensor for '{ours}'")
        copies[ours] = first
    return copies


def _all_there(copies: list[Copy], there: Container[str]) -> bool:
    return bool(copies) and all(copy.source in there for copy in copies)


def _patterns(names: tuple[Name, ...]) -> list[tuple[re.Pattern[str], Name]]:
    return [(re.compile(re.escape(name.ours).replace(r"\{layer\}", r"(\d+)")), name) for name in names]


def _spelled(
    patterns: list[tuple[re.Pattern[str], Name]],
    ours: str,
    shapes: Mapping[str, Index],
    model: ModelRecipe,
    there: Mapping[str, Index] | None,
) -> Iterator[Copy]:
    """The copies of one tensor of ours, by the names of one spelling."""
    mixers, kinds = layer_mixers(model), feed_forwards(model)
    for pattern, name in patterns:
        if not (match := pattern.fullmatch(ours)):
            continue
        if not match.groups():
            yield from _parts(name, name.theirs, shapes[ours], model)
        elif not name.mixer or mixers[int(match[1])] == name.mixer:
            if name.joined:
                yield from _across(name, match[1], ours, shapes, there or {})
                continue
            before = sum(2 - (kind == NONE) for kind in kinds[: int(match[1])])
            numbers = {"layer": match[1], "mixer": str(before), "ffn": str(before + 1)}
            yield from _parts(name, _numbered(name.theirs, numbers), shapes[ours], model)


def _numbered(name: str, numbers: Mapping[str, str]) -> str:
    return NUMBER.sub(lambda found: numbers[found[1]], name)


def _parts(name: Name, theirs: str, shape: Index, model: ModelRecipe) -> Iterator[Copy]:
    """The copies that one name stands for."""
    if "{expert}" not in theirs:
        axes = tuple(range(len(shape))) if name.axes is None else name.axes
        groups, widths, index = (1, shape[:1], 0) if name.rows is None else name.rows(model)
        for group in range(groups):
            first = group * sum(widths) + sum(widths[:index])
            start, rest = (group * widths[index],) if shape else (), shape[1:]
            source_start = tuple(first if axis == 0 else 0 for axis in axes)
            yield Copy(theirs, start + (0,) * len(rest), (*widths[index : index + 1], *rest), source_start, name.axes)
        return
    experts, inputs, outputs = shape
    start = 0
    if name.part != "whole":
        outputs //= 2
        start = outputs if name.part == "up" else 0
    for expert in range(experts):
        path = theirs.replace("{expert}", str(expert))
        yield Copy(path, (expert, 0, start), (1, inputs, outputs), (0, 0), EXPERT)


def _across(
    name: Name, layer: str, ours: str, shapes: Mapping[str, Index], there: Mapping[str, Index]
) -> Iterator[Copy]:
    """The copies of a tensor among several whose rows lie one behind the other, cut as they are `there`.

    Where they have not as many rows there, as if they were cut as ours are: what is wrong shows in their shapes.
    """
    own, sources = zip(*([text.replace("{layer}", layer) for text in pair] for pair in name.joined), strict=True)
    rows = {one: shapes[one][0] for one in own}
    lengths = [*rows.values()]
    cut = [(there.get(source) or (0,))[0] for source in sources]
    if sum(cut) != sum(lengths):
        cut = lengths
    first = sum(lengths[: own.index(ours)])
    axes, begin = name.axes or tuple(range(len(shapes[ours]))), 0
    for source, length in zip(sources, cut, strict=True):
        low, high = max(first, begin), min(first + rows[ours], begin + length)
        if low < high:
            start, shape = (low - first, *(0 for _ in shapes[ours][1:])), (high - low, *shapes[ours][1:])
            yield Copy(source, start, shape, tuple(low - begin if axis == 0 else 0 for axis in axes), name.axes)
        begin += length


def _stacks_experts(architecture: Architecture, there: Iterable[str]) -> bool:
    """Whether a directory has the experts of a layer in one tensor."""
    names = itertools.chain(architecture.names, *architecture.spellings)
    stacks = [name.theirs for name in names if ".experts." in name.ours and "{expert}" not in name.theirs]
    pattern = re.compile("|".join(r"\d+".join(map(re.escape, NUMBER.split(stack)[::2])) for stack in stacks))
    return any(pattern.fullmatch(name) for name in there)


class PublishedWeights:
    """A Hugging Face directory as a model of ours: its recipe, and its tensors by our names.

    Raises UserError, one line that names the file, key or tensor: whatever `Directory` raises, an unknown
    architecture, a tensor that is missing, of another shape, or that the architecture does not have.
    """

    def __init__(self, path: str | Path) -> None:
        self.directory = Directory(path)
        self.path = self.directory.path
        config = self.directory.config
        self.ignored: dict[str, int] = {}
        """Tensors of the directory that are left out: how many, by the pattern that says so."""
        architecture = None
        if config.get("architectures") == [ARCHITECTURE]:
            self.recipe = own_recipe(self.path / CONFIG, config)
        else:
            self.recipe, architecture = read_recipe(self.path, config), architecture_of(self.path, config)[1]
        self._check_size(architecture)
        self.shapes = model_shapes(self.recipe.model)
        if architecture is None:
            self.copies = own_copies(self.shapes)
        else:
            self._leave_out(architecture)
            self.copies = name_copies(architecture, self.recipe.model, self.shapes, self.directory.shapes)
        self._check()
        self.dtypes = {name: self._dtype(copies) for name, copies in self.copies.items()}

    def read(self, name: str, start: Index, shape: Index) -> Tensor:
        """A box of our tensor `name`, in the directory's type."""
        return read_box(self.copies[name], start, shape, self.dtypes[name], self.directory.read)

    def left_out(self) -> list[str]:
        """A line for every pattern by which tensors of the directory are left out."""
        return [f"{self.path}: left out: {count} tensors {pattern}" for pattern, count in self.ignored.items()]

    def _dtype(self, copies: list[Copy]) -> torch.dtype:
        """A type that holds every part of a tensor."""
        first, *others = {self.directory.dtypes[copy.source] for copy in copies}
        for other in others:
            first = torch.promote_types(first, other)
        return first

    def _check_size(self, architecture: Architecture | None) -> None:
        """Refuse a model of more layers and experts than there are tensors, before it is described tensor by tensor."""
        model, found = self.recipe.model, len(self.directory.shapes)
        least, keys = model.num_layers, f"model.num_layers = {model.num_layers}"
        if architecture and model.moe.num_experts and not _stacks_experts(architecture, self.directory.shapes):
            least += feed_forwards(model).count(EXPERTS) * model.moe.num_experts
            keys += f" and moe.num_experts = {model.moe.num_experts}"
        if least > found:
            raise UserError(f"{self.path / CONFIG}: {keys} take at least {least} tensors, the directory has {found}")

    def _leave_out(self, architecture: Architecture) -> None:
        """Forget the directory's tensors that the architecture's patterns leave out, and count them."""
        layers, shapes = self.recipe.model.num_layers, self.directory.shapes
        counts = Counter[str]()
        for pattern in architecture.ignored:
            expression = re.compile(pattern.replace("{beyond}", r"(?P<layer>\d+)"))
            for name in list(shapes):
                match = expression.fullmatch(name)
                if match and int(match.groupdict().get("layer") or layers) >= layers:
                    del shapes[name]
                    counts[pattern.replace("{beyond}", f"{layers}+").replace("\\", "")] += 1
        self.ignored = dict(counts)

    def _check(self) -> None:
        found = self.directory.shapes
        wanted = extents(copy for copies in self.copies.values() for copy in copies)
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
