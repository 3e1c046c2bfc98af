"""Numbers that the host reads later, without waiting for what the device was given to do in between.

Reading a tensor on a GPU waits for everything queued before the read. Here the copy is queued at once and only it is
waited for:

    device   step 1 | copy | step 2 ...
    host     queues both, queues step 2, waits for the copy: the device is never without work
"""

from __future__ import annotations

import torch
from torch import Tensor


class LateNumbers:
    """The values of a small tensor as it is now."""

    def __init__(self, values: Tensor) -> None:
        self._event = None
        if values.device.type != "cuda":
            self._host = values.clone()
        else:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[float]:
        """Wait for the copy; the values."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A small host tensor on `device`, without waiting for it."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)
