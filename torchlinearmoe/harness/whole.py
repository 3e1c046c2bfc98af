"""A model in training, put together: a copy of all of it on every rank, whatever the layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchlinearmoe.generation import cast_weights
from torchlinearmoe.initialize import reset_buffers
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.recipe import ModelRecipe


@torch.no_grad()
def whole_model(
    recipe: ModelRecipe,
    parts: Sequence[nn.Module],
    pipeline: dist.ProcessGroup,
    device: torch.device,
    dtype: torch.dtype,
) -> Decoder:
    """The model in eval mode, computing in `dtype` as in training; a tensor at a time is gathered besides.

    parts: what this rank has of it; pipeline: the ranks that have the rest. Every rank calls it.
    """
    with torch.device("meta"):
        model = Decoder(recipe)
    cast_weights(model, dtype)
    model.to_empty(device=device)
    reset_buffers(model)
    own: dict[str, Tensor] = {name: value for part in parts for name, value in part.state_dict().items()}
    names: list[list[str]] = [[] for _ in range(pipeline.size())]
    dist.all_gather_object(names, list(own), group=pipeline)
    for name, target in model.state_dict().items():
        if name in own:
            value = own[name]
            target.copy_(value.full_tensor() if isinstance(value, DTensor) else value)
        if pipeline.size() > 1:
            owner = next(rank for rank, held in enumerate(names) if name in held)
            dist.broadcast(target, group=pipeline, group_src=owner)
    return model.eval()
