"""Checkpoints written box by box hold what was given, one tensor in memory at a time."""

from pathlib import Path
from weakref import ref

import torch
from torch import Tensor

from torchlinearmoe.checkpoint.boxes import Place, slices
from torchlinearmoe.checkpoint.stream import SavedWeights, write_weights
from torchlinearmoe.recipe import dump, resolve


class Made:
    """Weights that are made when they are asked for."""

    path = Path("made")
    recipe = resolve({"training": {"steps": 1}})
    shapes = {f"layers.{i}.weight": (6, 5) for i in range(8)} | {"scale": ()}
    dtypes = dict.fromkeys(shapes, torch.bfloat16)

    def __init__(self) -> None:
        self.most_alive = 0
        self._given: list[ref[torch.UntypedStorage]] = []

    def whole(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(list(self.shapes).index(name))
        return torch.randn(self.shapes[name], generator=generator).bfloat16()

    def read(self, name: str, start: Place, shape: Place) -> Tensor:
        box = self.whole(name)[slices(start, shape)]
        box = box if any(start) else box.clone()
        self.most_alive = max(self.most_alive, sum(given() is not None for given in self._given) + 1)
        self._given.append(ref(box.untyped_storage()))
        return box


def test_boxes_come_back_and_none_outlives_its_turn(tmp_path: Path) -> None:
    made = Made()
    boxes = {name: [((0, 0), (2, 5)), ((2, 0), (4, 5))] if shape else [((), ())] for name, shape in made.shapes.items()}
    write_weights(tmp_path / "written", made, boxes, {"recipe.toml": dump(made.recipe)})
    assert made.most_alive == 1
    saved = SavedWeights(tmp_path / "written")
    assert saved.shapes == made.shapes and saved.dtypes == made.dtypes
    for name, shape in made.shapes.items():
        assert torch.equal(saved.read(name, (0,) * len(shape), shape), made.whole(name))
    (file,) = (tmp_path / "written").rglob("*.distcp")
    assert file.stat().st_size < 17 * 3000, "a box took its whole tensor along"
