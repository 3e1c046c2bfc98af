"""The states that enter a rank's spans: a gather of every rank's (A, B), folded back to where each document started.

LASP-2 (Sun et al. 2025, arXiv 2502.07563): a span maps the state that enters it to S_out = A S_in + B, so

    S_in = B_{p-1} + A_{p-1} (B_{p-2} + A_{p-2} (...))

over the ranks before rank p, no further back than the document reaches.

Letters: W ranks, R rows, G heads of the state, K and V key and value width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlinearmoe.parallel.exchange.gather import Pending, finish_gather, start_gather
from torchlinearmoe.spans import Spans


@dataclass
class StateExchange:
    """The all-gather of every rank's (A, B), and what of it enters this rank's spans.

    `written`: the B, each [R, G, K, V]; `a`: None for 1; [R, G, 1 or K], factors of the rows of every B; or with
    `dense` [R, G, K, K]. No A travels where no document passes through a span.
    """

    spans: Spans
    written: list[Tensor]
    a: Tensor | None
    dense: bool = False

    def __post_init__(self) -> None:
        parts = list(self.written)
        self.a = self.a if self.spans.passed else None
        if self.a is not None:
            parts.append(self.a)
        self.shapes = [part.shape for part in parts]
        self.dtype = parts[0].dtype
        packed = torch.cat([part.flatten(1).to(self.dtype) for part in parts], 1)
        self.pending: Pending = start_gather(packed.to(self.spans.exchange.states or packed.dtype), self.spans.group)

    def entering(self) -> list[Tensor]:
        """The states that enter this rank's spans, [R, G, K, V] each; zeros where a document starts there."""
        gathered = finish_gather(self.pending).to(self.dtype)
        sizes = [shape[1:].numel() for shape in self.shapes]
        parts = [x.unflatten(-1, shape[1:]).unbind(0) for x, shape in zip(gathered.split(sizes, -1), self.shapes)]
        return [self._fold(b, None if self.a is None else parts[-1]) for b in parts[: len(self.written)]]

    def _fold(self, b_W: tuple[Tensor, ...], a_W: tuple[Tensor, ...] | None) -> Tensor:
        spans = self.spans
        # The first rank has nothing to fold, but must take part in the backward pass of the gather.
        state = b_W[min(spans.earliest, spans.size - 1)]
        for w in range(spans.earliest + 1, spans.rank):
            passed = state
            if a_W is not None:
                passed = torch.matmul(a_W[w], state) if self.dense else a_W[w].unsqueeze(-1) * state
            through = spans.through_WR[w].view(-1, *[1] * (state.dim() - 1))
            state = b_W[w] + torch.where(through, passed, 0.0)
        return torch.where(spans.enters_R.view(-1, *[1] * (state.dim() - 1)), state, 0.0)
