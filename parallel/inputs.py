"""What one forward of a model in training takes, and every stage of a pipeline with it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchlinearmoe.documents import Documents
from torchlinearmoe.moe.totals import StepTotals


@dataclass(frozen=True, eq=False)
class Inputs:
    """A micro-batch on this rank's device."""

    tokens: Tensor
    """int64 [T]"""
    labels: Tensor
    """int64 [T], -100 where there is nothing to predict."""
    documents: Documents
    totals: StepTotals | None = None
    """Of the optimizer step; None outside training."""
