"""Parameters that several pipeline stages have a copy of: a mixer's shared module, a tied embedding.

Every copy sees the gradient of its own stage. They are summed once a step, before clipping, so that equal copies take
equal steps and stay equal; the norm counts the copy of the first of these stages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchlinearmoe.optim.masters import laid_out_like, local_part, rest_of
from torchlinearmoe.parallel.mesh import Meshes
from torchlinearmoe.parallel.pipeline import shared_between, stage_ranks
from torchlinearmoe.parallel.stage import Stage
from torchlinearmoe.recipe.schema import Recipe


class SharedParameters:
    """The copies on this rank, and who has the others. Made by all ranks of a pipeline together."""

    def __init__(self, parts: Sequence[Stage], layers: list[range], recipe: Recipe, meshes: Meshes) -> None:
        self.counted_elsewhere: list[nn.Parameter] = []
        """Copies whose gradient the norm takes from another one."""
        self._copies: list[tuple[dist.ProcessGroup | None, list[list[nn.Parameter]]]] = []
        ranks = stage_ranks(recipe.parallel)
        for path, holders in shared_between(recipe.model, layers).items():
            mine = [part for part in parts if part.index in holders]
            if not mine:
                continue
            owners = sorted({ranks[stage] for stage in holders})
            group = meshes.some_stages(owners) if len(owners) > 1 else None
            copies = [list(part.get_submodule(path).parameters()) for part in mine]
            self._copies.append((group, copies))
            for part, parameters in zip(mine, copies):
                if part.index != holders[0]:
                    self.counted_elsewhere += parameters

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Give every copy the sum of all copies' gradients; once a step, after its last backward."""
        for group, copies in self._copies:
            for same in zip(*copies):
                gradients = [_local_gradient(parameter) for parameter in same]
                total = torch.stack(gradients).sum(0) if len(gradients) > 1 else gradients[0]
                if group is not None:
                    dist.all_reduce(total, group=group)
                for gradient in gradients:
                    if gradient is not total:
                        gradient.copy_(total)


def _local_gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's piece of the gradient, at least float32, shares its memory; zeros where the step gave none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    if rest_of(parameter) is not None:
        parameter.grad = laid_out_like(parameter, local_part(parameter.grad).float())
    return local_part(parameter.grad)
