"""Decays that are absent, constant per head, or one number per token and head, inside a chunk: D[t, s], the decay from
s to t, and what goes with it at the chunk's ends.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunked.decay import (
    FLOOR,
    causal_mask,
    decay_factor,
    decay_matrix,
    decayed,
    running_sum,
)
from torchlinearmoe.kernels.chunked.layout import Layout


@dataclass(frozen=True)
class ScalarDecay:
    """The decays of every chunk; H is 1 where heads share them, and a field is None where nothing decays."""

    matrix: Tensor
    """[1, 1 or H, 1 or M, C, C]: from token s (last dim) to token t, 0 outside the document or the past."""
    running: Tensor | None
    """[1, 1 or H, 1 or M, C]: the log decay since the start of the chunk, whose differences the matrix holds."""
    prefix: Tensor | None
    """[.., C, 1]: since the document entered the chunk (without states: right for carried tokens only)."""
    suffix: Tensor | None
    """[.., C, 1]: until the document leaves the chunk (without states: right for its last document only)."""
    log_total: Tensor
    """[1, 1 or H, M, 1]"""

    def apply(self, scores: Tensor) -> Tensor:
        """scores [1, H, M, C, C] times the matrix."""
        if self.running is None:
            return scores * self.matrix.to(scores.dtype)
        return decayed(scores, self.matrix, self.running)


def scalar_decay(layout: Layout, log_decay: Tensor | None, device: torch.device, dtype: torch.dtype) -> ScalarDecay:
    """The decays of every chunk for log_decay None, [H] or [T, H]."""
    documents, mask = layout.documents, layout.documents.same_MCC
    if log_decay is None:
        zero = torch.zeros(1, 1, layout.M, 1, device=device, dtype=dtype)
        return ScalarDecay(mask.to(dtype), None, None, None, zero)
    if log_decay.dim() == 1:
        # With states, the padding and the borders must not decay them: treat the tokens one by one.
        if layout.edges is None:
            return _constant_decay(layout, log_decay, dtype)
        log_decay = log_decay.expand(layout.T, -1)
    total = running_sum(layout.split(log_decay), -1)  # [B, H, M, C]
    matrix = decay_matrix(total, total, mask, dtype)
    since, until = torch.zeros_like(total[..., :1]), total[..., -1:]
    if layout.edges is not None:
        shape = total.shape
        before = torch.cat([since, total[..., :-1]], -1)
        since = before.gather(-1, documents.first_MC.expand(shape))
        until = total.gather(-1, documents.final_MC.expand(shape))
    return ScalarDecay(
        matrix=matrix,
        running=total,
        prefix=decay_factor(total - since, dtype).unsqueeze(-1),
        suffix=decay_factor(until - total, dtype).unsqueeze(-1),
        log_total=total[..., -1:].to(dtype),
    )


def _constant_decay(layout: Layout, log_decay_H: Tensor, dtype: torch.dtype) -> ScalarDecay:
    """One matrix for all chunks; documents only mask it."""
    C = layout.C
    steps = torch.arange(1, C + 1, device=log_decay_H.device, dtype=torch.float64)
    total = log_decay_H.double().clamp(min=FLOOR).view(1, -1, 1, 1) * steps  # [1, H, 1, C]
    matrix = decay_matrix(total, total, causal_mask(C, log_decay_H.device), dtype) * layout.documents.same_MCC
    return ScalarDecay(
        matrix=matrix,
        running=total,
        prefix=decay_factor(total, dtype).unsqueeze(-1),
        suffix=decay_factor(total[..., -1:] - total, dtype).unsqueeze(-1),
        log_total=total[..., -1:].to(dtype).expand(-1, -1, layout.M, -1),
    )
