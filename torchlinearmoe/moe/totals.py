"""What one optimizer step holds in total: the denominators every auxiliary loss carries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepTotals:
    """Totals of one optimizer step over all ranks and all of its micro-batches.

    A loss divided by these, then summed over micro-batches and ranks, is the loss of the step, however
    the step was cut. They are host integers: known from the recipe before the step runs.
    """

    tokens: int
    """Tokens that enter the model, those whose label is ignored included."""
    sequences: int
    """Packed sequences (rows of `sequence_length` tokens)."""
