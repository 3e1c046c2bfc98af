"""New tokens of several sequences over caches in and out of order, with entries that hold nothing."""

from __future__ import annotations

from functools import partial

import torch

from cases import Case
from torchlinearmoe.kernels.cached_attention import cached_attention


def cached(
    starts: tuple[int, ...],
    new: int,
    room: int,
    heads: int = 4,
    groups: int = 2,
    width: int = 16,
    value_width: int = 16,
    window: int = 0,
    shuffled: bool = False,
) -> Case:
    """`new` tokens a sequence after `starts`, in caches of `room` entries."""
    batch, ends = len(starts), torch.tensor(starts)[:, None] + new
    inputs = {
        "q": torch.randn(batch, heads, new, width, dtype=torch.float64).transpose(1, 2),
        "k_cache": torch.randn(batch, groups, room, width, dtype=torch.float64).transpose(1, 2),
        "v_cache": torch.randn(batch, groups, room, value_width, dtype=torch.float64).transpose(1, 2),
    }
    options = {"query_positions": ends - new + torch.arange(new), "scale": 0.31, "window": window}
    if shuffled:
        positions = torch.stack([torch.randperm(room) for _ in starts])
        options["key_positions"] = torch.where(positions < ends, positions, -1 - positions)
    return Case("cached_attention", cached_attention, inputs, options, channels=width)


CASES = [
    partial(cached, (1,), 1, 2),
    partial(cached, (0, 3, 5), 2, 9),
    partial(cached, (0, 3, 5), 2, 9, heads=3, groups=1, width=7, value_width=5, shuffled=True),
    partial(cached, (40, 7), 1, 64, heads=2, groups=2, width=5, value_width=5),
    partial(cached, (6, 11), 3, 16, window=4, shuffled=True),
    partial(cached, (6, 11), 3, 16, window=2),
]
