"""Weights that are not finite: used as they are, but never without a word."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from torchlinearmoe.errors import visible
from torchlinearmoe.optim.masters import local_part

logger = logging.getLogger(__name__)


def is_finite(tensor: Tensor) -> bool:
    """Whether this rank's part of a tensor holds neither NaN nor an infinite value."""
    local = local_part(tensor.detach())
    if not local.is_floating_point() or not local.numel():
        return True
    low, high = local.aminmax()  # a NaN anywhere is both
    return bool(torch.isfinite(low) & torch.isfinite(high))


def tell_nonfinite(where: object, names: Collection[str], total: int) -> None:
    """Log one line when there are `names` of tensors, out of `total`, that are not finite."""
    if names:
        logger.warning(
            "%s: %d of %d tensors of the model hold NaN or infinite values, the first is '%s'",
            *(visible(str(where)), len(names), total, visible(min(names))),
        )


def nonfinite_names(tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> set[str]:
    """The names of those that are not finite on any rank of `group`; every rank of it calls this."""
    own = {name for name, tensor in tensors.items() if not is_finite(tensor)}
    if group is None:
        return own
    every: list[set[str]] = [set()] * dist.get_world_size(group)
    dist.all_gather_object(every, own, group=group)
    return set().union(*every)
