"""torch.compile by regions.

A block is not compiled as a whole: units that FSDP gathers by themselves (experts, float32 decays, routers) cannot be
inside a full graph. Each module names the methods between them in `regions` (`name`, or `part.name`);
they are compiled here and nowhere else.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import nn


def compile_regions(model: nn.Module, backend: str) -> int:
    """Compile every region of `model` in place; returns how many."""
    # Layers of one kind share code, and each may specialise once for training and once for evaluation.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)  # pyright: ignore
    compiled = 0
    for module in model.modules():
        for path in getattr(module, "regions", ()):
            *owners, name = path.split(".")
            owner = reduce(getattr, owners, module)
            setattr(owner, name, torch.compile(getattr(owner, name), backend=backend))
            compiled += 1
    return compiled
