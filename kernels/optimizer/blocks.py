"""Many tensors as one list of blocks, so that one launch works on all of them.

Three tensors of 5, 3 and 2 elements in blocks of 4 (a real block has thousands):

    block           0        1      2        3
    tensor          0        0      1        2
    first block     0        0      2        3       of the tensor: block - first = its block within
    elements        0..3     4      0..2     0..1

A kernel is given the tensors' addresses as integers. They are read from device memory, so that no launch waits and a
table that does not change is made once; gradients, which move from step to step, have a row of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

BLOCK = 8192
"""Elements of a block."""
ALIGNMENT = 16
"""Bytes: kernels read whole vectors from where a tensor begins."""


class Blocks:
    """The blocks of tensors of the given sizes, on `device`."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        counts = np.array([-(-size // BLOCK) for size in sizes], dtype=np.int64)
        ends = counts.cumsum()
        self.count = int(ends[-1]) if len(sizes) else 0
        self.tensor = to_device(np.repeat(np.arange(len(sizes), dtype=np.int32), counts), device)
        """int32 [blocks]: the tensor of each block."""
        self.first = to_device((ends - counts).astype(np.int32), device)
        """int32 [tensors]: the first block of each tensor."""
        self.size = to_device(np.array(sizes, dtype=np.int64), device)
        """int64 [tensors]: elements."""


@lru_cache(maxsize=32)
def blocks_of(sizes: tuple[int, ...], device: torch.device) -> Blocks:
    """The `Blocks` of these sizes, made once."""
    return Blocks(sizes, device)


def addresses(tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """int64 [tensors] on `device`, 0 for None; the copy does not wait."""
    found = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    assert not any(address % ALIGNMENT for address in found), "a tensor does not begin at a whole vector"
    return to_device(np.array(found, dtype=np.int64), device)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where kernels could not read it: not contiguous, or beginning within a vector."""
    if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A host array on `device`, without waiting for it."""
    host = torch.from_numpy(values)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
