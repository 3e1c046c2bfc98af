"""Heads of odd sizes, labels that are ignored, hidden states and weights of any stride."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from cases import Case
from torchlinearmoe.kernels.cross_entropy import IGNORED, linear_cross_entropy


def scaled_loss(hidden: Tensor, weight: Tensor, labels: Tensor, backend: str) -> Tensor:
    """The loss is seldom what is differentiated as it is."""
    return 0.37 * linear_cross_entropy(hidden, weight, labels, backend=backend)


def head(tokens: int, width: int, vocab_size: int, ignored: float = 0.3, strided: bool = False) -> Case:
    """A share of the labels is ignored."""
    hidden = torch.randn(tokens, width, dtype=torch.float64)
    weight = torch.randn(vocab_size, width, dtype=torch.float64)
    if strided:
        hidden, weight = (x.t().contiguous().t() for x in (hidden, weight))
    labels = torch.randint(0, vocab_size, (tokens,))
    labels[torch.rand(tokens) < ignored] = IGNORED
    return Case("cross_entropy", scaled_loss, {"hidden": hidden, "weight": weight}, {"labels": labels})


CASES = [
    partial(head, 37, 16, 53),
    partial(head, 1, 3, 2, ignored=0.0),
    partial(head, 130, 33, 257, strided=True),
    partial(head, 9, 8, 16, ignored=1.1),
]
