"""Where the elements of a rank's part of a parameter lie in the whole."""

from __future__ import annotations

import math

from torch import Tensor
from torch.distributed.tensor import DTensor

from torchlinearmoe.initialize import local_boxes
from torchlinearmoe.kernels.optimizer.definition import Place


def place_of(parameter: Tensor) -> Place:
    """The `Place` of the local part of a plain tensor or DTensor.

    Part [2:4, 0:3] of [4, 6]: elements 12 13 14 and 18 19 20, so base 12, inner 3, stride 6.
    """
    if not isinstance(parameter, DTensor):
        return Place()
    boxes = list(local_boxes(parameter))
    if not boxes:
        return Place()
    ((region, start),) = boxes
    shape, sizes = tuple(parameter.shape), tuple(r.stop - r.start for r in region)
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    base = sum(s * stride for s, stride in zip(start, strides))
    cut = max((dim for dim in range(len(shape)) if sizes[dim] != shape[dim]), default=0)
    if math.prod(sizes[:cut]) == 1:
        return Place(base)
    assert sizes[1:cut] == shape[1:cut], "a part is cut along dim 0 and one other"
    return Place(base, math.prod(sizes[cut:]), strides[cut - 1])
