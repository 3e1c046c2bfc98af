"""Which blocks of 128 keys the blocks of 128 queries see: FlexAttention's masks, from where documents begin.

The keys that a query sees are consecutive, and so are those that any of a block's queries sees. So a block of queries
sees a run of blocks of keys, the middle of it whole, and nothing is as large as queries times keys:

    documents a a a b b b b b, blocks of 2       queries 0 1 | 2 3 | 4 5 | 6 7
    keys of the first and of the last of each    0-0 0-1 | 0-2 3-3 | 3-4 3-5 | 3-6 3-7
    blocks of keys, * seen whole                 0 | 0* 1 | 1 2 | 1 2* 3

Letters: R rows, L queries and M keys of a row, the last L of these being the queries' own; I and J blocks of each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128


class SeenBlocks(NamedTuple):
    """By block of queries: how many blocks of keys it sees and which, in part and whole; int32."""

    part_count: Tensor
    """[R, 1, I]."""
    part: Tensor
    """[R, 1, I, J], what comes behind the count meaning nothing."""
    whole_count: Tensor
    whole: Tensor


def seen_blocks(ids: Tensor, earlier: int, window: int) -> SeenBlocks:
    """Of rows of queries with the documents `ids`, int [R, L], never falling, after `earlier` keys of the first."""
    rows, length = ids.shape
    device, queries, keys = ids.device, -(-length // BLOCK), -(-(length + earlier) // BLOCK)
    place = torch.arange(length, device=device)
    begins = torch.cat([ids.new_zeros(rows, 1, dtype=torch.bool), ids[:, 1:] != ids[:, :-1]], 1)
    first_RL = torch.where(begins, place + earlier, 0).cummax(1).values
    if window:
        first_RL = torch.maximum(first_RL, (place + earlier + 1 - window).clamp(min=0))
    # Of the first and the last query of each block: both ends of what a query sees never fall.
    start_I = torch.arange(queries, device=device) * BLOCK
    last_I = (start_I + BLOCK - 1).clamp(max=length - 1)
    low_RI, high_RI = first_RL[:, start_I], first_RL[:, last_I]
    seen_RI = (low_RI // BLOCK, ((last_I + earlier) // BLOCK + 1).expand(rows, -1))
    whole_RI = (-(-high_RI // BLOCK), ((start_I + earlier + 1) // BLOCK).expand(rows, -1))
    complete_I = start_I + BLOCK <= length
    whole_count_RI = ((whole_RI[1] - whole_RI[0]) * complete_I).clamp(min=0)
    # Without a whole block the two parts meet where the run ends.
    split_RI = torch.where(whole_count_RI > 0, whole_RI[0], seen_RI[1])
    before_RI = split_RI - seen_RI[0]
    nth_J = torch.arange(keys, device=device)
    part_RIJ = seen_RI[0].unsqueeze(2) + nth_J + (nth_J >= before_RI.unsqueeze(2)) * whole_count_RI.unsqueeze(2)
    whole_RIJ = split_RI.unsqueeze(2) + nth_J
    part_RIJ, whole_RIJ = (x.clamp(max=keys - 1) for x in (part_RIJ, whole_RIJ))
    part_count_RI = seen_RI[1] - seen_RI[0] - whole_count_RI
    return SeenBlocks(*(x.int().unsqueeze(1) for x in (part_count_RI, part_RIJ, whole_count_RI, whole_RIJ)))
