"""Documents cut into chunks of 64 tokens, each document beginning a chunk of its own, so that no chunk needs a mask."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

CHUNK = 64


@dataclass(frozen=True)
class ChunkTable:
    """M chunks of N documents, in the order of the tokens."""

    start_M: Tensor
    """int32: the first token of each chunk."""
    end_M: Tensor
    """int32: one past its last token."""
    first_N1: Tensor
    """int32 [N + 1]: the first chunk of each document, and M."""

    @property
    def chunks(self) -> int:
        """M."""
        return self.start_M.shape[0]

    @property
    def documents(self) -> int:
        """N."""
        return self.first_N1.shape[0] - 1


@lru_cache(maxsize=32)
def chunk_table(lengths: tuple[int, ...], device: torch.device) -> ChunkTable:
    """The chunks of documents of `lengths` tokens, at least one each, that lie one after the other."""
    starts, ends, first, token = [], [], [0], 0
    for length in lengths:
        end = token + length
        starts += range(token, end, CHUNK)
        ends += [min(start + CHUNK, end) for start in range(token, end, CHUNK)]
        first.append(len(starts))
        token = end
    return ChunkTable(*(torch.tensor(x, dtype=torch.int32, device="cpu").to(device) for x in (starts, ends, first)))
