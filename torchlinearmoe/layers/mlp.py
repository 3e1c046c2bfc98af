"""Dense SwiGLU feed-forward (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import Placement, Shard

from torchlinearmoe.initialize import linear
from torchlinearmoe.module import Module


class SwiGLU(Module):
    """down(silu(gate(x)) * up(x)), D -> F -> D."""

    def __init__(self, width: int, hidden: int, std: float, out_std: float) -> None:
        super().__init__()
        self.gate_proj = linear(width, hidden, std)
        self.up_proj = linear(width, hidden, std)
        self.down_proj = linear(hidden, width, out_std)

    def tensor_parallel(self) -> dict[str, Placement]:
        """Hidden channels are split."""
        return {"gate_proj.weight": Shard(0), "up_proj.weight": Shard(0), "down_proj.weight": Shard(1)}

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
