"""From logits to the next token: the largest, or a draw.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlinearmoe.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen. Raises UserError for a value that means nothing."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the most probable token (greedy)."""
    top_k: int = 0
    """Draw among this many of the most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Draw among the fewest most probable tokens that together have this probability (Holtzman et al. 2020, arXiv
    1904.09751)."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(f"temperature = {self.temperature}: must be a number of at least 0 (0 is greedy)")
        if not -(2**63) <= self.seed < 2**64:
            raise UserError(f"seed = {self.seed}: must have at most 64 bits")
        if self.top_k < 0:
            raise UserError(f"top_k = {self.top_k}: must be at least 1, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: must lie in (0, 1]")
        for name, said in (("top_k", self.top_k > 0), ("top_p", self.top_p < 1)):
            if said and not self.temperature:
                raise UserError(
                    f"{name} = {getattr(self, name)}: at temperature 0, greedy, nothing is drawn; give one above 0"
                )


GREEDY = Sampling()


def choose(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """The next token of each sequence, int64 [B], from logits [B, V] of any floating type; draws come from `generator`.

    The temperature comes first, then top-k, then top-p among what is left, the token that crosses `top_p` included.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    # At a temperature next to 0 the most probable token is left, and no infinity less another.
    wide_BV = logits_BV.float()
    wide_BV = (wide_BV - wide_BV.amax(-1, keepdim=True)) / max(sampling.temperature, torch.finfo(torch.float32).tiny)
    kept = min(sampling.top_k or wide_BV.shape[-1], wide_BV.shape[-1])
    values, ids = wide_BV.topk(kept, dim=-1)
    probs = values.softmax(-1)
    if sampling.top_p < 1:
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill(before >= sampling.top_p, 0.0)
        probs[:, 0].clamp_(min=torch.finfo(probs.dtype).tiny)
    return ids.gather(-1, torch.multinomial(probs, 1, generator=generator)).squeeze(-1)
