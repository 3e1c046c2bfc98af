"""All parameters of one kind, prepared for one launch: their addresses, sizes and step counts on the GPU.

Made once and kept while the same parameters have gradients; only the gradients' addresses are sent anew each step. The
step counts of all parameters are one vector, of which each state's `step` is an element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchlinearmoe.kernels.optimizer.blocks import addresses, blocks_of, to_device
from torchlinearmoe.kernels.optimizer.definition import Slot
from torchlinearmoe.optim.gradients import Parts, for_launch
from torchlinearmoe.optim.masters import local_part, rest_of

Member = tuple[Tensor, dict[str, Any]]
"""A parameter and its group."""


class Launch:
    """Parameters whose gradients, weights and moments have the same types, on one GPU."""

    def __init__(self, members: Sequence[Member], states: Sequence[dict[str, Tensor]], slots: Sequence[Slot]):
        device = slots[0].weight.device
        self._steps = torch.stack([state["step"] for state in states]).float()
        for state, step in zip(states, self._steps.unbind()):
            state["step"] = step
        self._known = _identity(members, states)
        self._slots = list(slots)
        self._blocks = blocks_of(tuple(slot.weight.numel() for slot in slots), device)
        columns = [
            addresses([slot.weight for slot in slots], device),
            addresses([slot.rest for slot in slots], device),
            addresses([slot.exp_avg for slot in slots], device),
            addresses([slot.exp_avg_sq for slot in slots], device),
            self._blocks.size,
        ]
        numbers = [[s.place.base, s.place.inner, s.place.stride, s.key] for s in slots]
        places = to_device(np.array(numbers, dtype=np.int64), device)
        self._table = torch.cat([torch.stack(columns, 1), places], 1).contiguous()  # triton.COLUMNS wide
        self._decay = to_device(np.array([slot.weight_decay for slot in slots]), device)
        self._places = any(slot.place.inner for slot in slots)

    def fits(self, members: Sequence[Member], states: Sequence[dict[str, Tensor]]) -> bool:
        """Whether these are its parameters, where they were, with the states it knows."""
        return self._known == _identity(members, states)

    def run(self, gradients: Sequence[Parts], group: dict[str, Any], factor: Tensor, skipped: Tensor) -> None:
        """One step; gradients in the order of the parameters; `group` has lr, betas and eps."""
        from torchlinearmoe.kernels.optimizer import triton

        lr, (beta1, beta2) = group["lr"], group["betas"]
        self._steps += 1 - skipped
        steps = self._steps.double()
        size = lr / (1 - beta1**steps)
        spread = (1 - beta2**steps).rsqrt()
        first = self._slots[0]
        triton.adamw(
            self._blocks,
            self._table,
            for_launch(gradients),
            torch.stack([1 - lr * self._decay, size, spread], 1).float(),
            self._steps,
            factor,
            skipped,
            betas=group["betas"],
            eps=group["eps"],
            split=first.rest is not None,
            half_state=first.exp_avg.dtype == torch.bfloat16,
            places=self._places,
        )


def _identity(members: Sequence[Member], states: Sequence[dict[str, Tensor]]) -> list[tuple[Any, ...]]:
    """What a table was made of: addresses of all that a kernel writes, and the decays."""
    return [
        (
            local_part(parameter.detach()).data_ptr(),
            0 if (rest := rest_of(parameter)) is None else rest.data_ptr(),
            local_part(state["exp_avg"]).data_ptr(),
            local_part(state["exp_avg_sq"]).data_ptr(),
            state["step"].data_ptr(),
            group["weight_decay"],
        )
        for (parameter, group), state in zip(members, states, strict=True)
    ]
