"""Checkpoints written box by box hold what was given, one tensor in memory at a time."""

import math
from pathlib import Path
from weakref import ref

import torch
from torch import Tensor

from torchlinearmoe.checkpoint.boxes import Index, slices
from torchlinearmoe.checkpoint.huggingface.weights import model_shapes
from torchlinearmoe.checkpoint.stream import SavedWeights, write_weights
from torchlinearmoe.recipe import dump, resolve


class Made:
    """Weights that are made when they are asked for."""

    path = Path("made")
    recipe = resolve({"model": {"num_layers": 1}, "training": {"steps": 1}})
    shapes = model_shapes(recipe.model)
    dtypes = dict.fromkeys(shapes, torch.bfloat16)

    def __init__(self) -> None:
        self.most_alive = 0
        self._given: list[ref[torch.UntypedStorage]] = []

    def whole(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(list(self.shapes).index(name))
        return torch.randn(self.shapes[name], generator=generator).bfloat16()

    def read(self, name: str, start: Index, shape: Index) -> Tensor:
        box = self.whole(name)[slices(start, shape)]
        box = box if any(start) else box.clone()
        self.most_alive = max(self.most_alive, sum(given() is not None for given in self._given) + 1)
        self._given.append(ref(box.untyped_storage()))
        return box


def halves(shape: Index) -> list[tuple[Index, Index]]:
    """The first two rows and the others, where there are more."""
    zeros = (0,) * len(shape)
    if shape[0] <= 2:
        return [(zeros, shape)]
    return [(zeros, (2, *shape[1:])), ((2, *zeros[1:]), (shape[0] - 2, *shape[1:]))]


def test_boxes_come_back_and_none_outlives_its_turn(tmp_path: Path) -> None:
    made = Made()
    boxes = {name: halves(shape) for name, shape in made.shapes.items()}
    write_weights(tmp_path / "written", made, boxes, {"recipe.toml": dump(made.recipe)})
    assert made.most_alive == 1
    saved = SavedWeights(tmp_path / "written")
    assert saved.shapes == made.shapes and saved.dtypes == made.dtypes
    for name, shape in made.shapes.items():
        assert torch.equal(saved.read(name, (0,) * len(shape), shape), made.whole(name))
    (file,) = (tmp_path / "written").rglob("*.distcp")
    size = sum(2 * math.prod(shape) + 2 * 3000 for shape in made.shapes.values())
    assert file.stat().st_size < size, "a box took its whole tensor along"
