"""`checkpoint.init_from`: a model starts from the weights of another, each rank reading what its shards touch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchlinearmoe.checkpoint.boxes import read_box
from torchlinearmoe.checkpoint.huggingface.directory import is_directory
from torchlinearmoe.checkpoint.huggingface.weights import PublishedWeights, model_shapes
from torchlinearmoe.checkpoint.nonfinite import is_finite, tell_nonfinite
from torchlinearmoe.checkpoint.state import MODEL, as_parts, model_entries
from torchlinearmoe.checkpoint.stream import SavedWeights, Weights
from torchlinearmoe.checkpoint.transplant import describe, plan_transplant
from torchlinearmoe.disk import expanded
from torchlinearmoe.errors import RecipeError, UserError
from torchlinearmoe.initialize import Normal, add_noise, local_boxes
from torchlinearmoe.optim.masters import read_master, write_master
from torchlinearmoe.recipe import Recipe

T = TypeVar("T")


class InitialWeights:
    """The weights that `checkpoint.init_from` names, and what of them a recipe's model takes.

    Made before the model: a directory or checkpoint that is not sound, or does not fit the recipe, is a UserError.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.weights = open_weights(recipe.checkpoint.init_from)
        self.plan = plan_transplant(recipe.model, model_shapes(recipe.model), self.weights)
        noise = recipe.checkpoint.upcycle_noise
        if noise and not self.plan.upcycled:
            raise RecipeError(
                f"checkpoint.upcycle_noise = {noise}: no expert is made of a dense feed-forward here; set it to 0"
            )

    def describe(self) -> list[str]:
        """What is taken and what is not, a few lines."""
        left_out = self.weights.left_out() if isinstance(self.weights, PublishedWeights) else []
        return [*left_out, *describe(self.plan, str(self.weights.path))]

    @torch.no_grad()
    def load(self, model: nn.Module | Sequence[nn.Module], group: dist.ProcessGroup | None = None) -> None:
        """Fill an initialised model in place, or the parts of it that this rank holds, DTensors of any layout.

        Every rank of `group` calls it. Raises UserError on all of them when one cannot read.
        """
        problem, bad = None, set[str]()
        try:
            for part in as_parts(model):
                for key, entry in model_entries(part).items():
                    if (name := key.removeprefix(MODEL)) in self.plan.copies:
                        master = read_master(entry)
                        self._fill(name, master)
                        write_master(entry, master)
                        if not is_finite(master):
                            bad.add(name)
        except (UserError, OSError) as error:
            problem = str(error)
        reports = _exchange((problem, bad), group)
        for found, _ in reports:
            if found is not None:
                raise UserError(found)
        if group is None or dist.get_rank(group) == 0:
            every = set[str]().union(*(names for _, names in reports))
            tell_nonfinite(f"checkpoint.init_from = '{self.weights.path}'", every, len(self.plan.copies))

    def _fill(self, name: str, tensor: Tensor) -> None:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for region, start in local_boxes(tensor):
            part = local[region]
            shape = tuple(part.shape)
            part.copy_(read_box(self.plan.copies[name], start, shape, part.dtype, self.weights.read))
        noise = self.recipe.checkpoint.upcycle_noise
        if noise and name in self.plan.upcycled:
            add_noise(tensor, Normal(noise), f"{self.recipe.training.seed}/upcycle/{name}")


def open_weights(path: str | Path) -> Weights:
    """The weights of a Hugging Face directory or of a checkpoint. Raises UserError."""
    path = expanded(path, "checkpoint.init_from")
    if not path.is_dir():
        raise UserError(f"checkpoint.init_from = '{path}': no such folder")
    return PublishedWeights(path) if is_directory(path) else SavedWeights(path)


def _exchange(report: T, group: dist.ProcessGroup | None) -> list[T]:
    if group is None:
        return [report]
    reports: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reports, report, group=group)
    return reports
