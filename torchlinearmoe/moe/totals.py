"""What one optimizer step holds in total: the denominators every auxiliary loss carries."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepTotals:
    """Totals of one optimizer step over all ranks and all of its micro-batches.

    A loss divided by these, then summed over micro-batches and ranks, is the loss of the step, however
    the step was cut. `tokens` and `sequences` are known from the recipe before the step runs.
    """

    tokens: int
    """Tokens that enter the model, padding and those whose label is ignored included."""
    sequences: int
    """Packed sequences (rows of `sequence_length` tokens)."""
    without_padding: Tensor | None = None
    """Tokens that are no padding, 0-dim on the device: only the data knows. None: all."""

    @property
    def counted(self) -> int | Tensor:
        """Tokens that token means are taken over."""
        return self.tokens if self.without_padding is None else self.without_padding
