"""Norms of heads, groups and whole rows, with and without a gate, over parts of a row."""

from __future__ import annotations

from functools import partial

import torch

from cases import Case
from torchlinearmoe.kernels.norm import rms_norm


def norm(
    shape: tuple[int, ...],
    weight_dims: int = 1,
    gate: bool = False,
    sigmoid: bool = False,
    part: bool = False,
    strided: bool = False,
) -> Case:
    """x of `shape`, weights of its last dims; part: the mean square is that of a longer row."""

    def draw(*shape: int) -> torch.Tensor:
        x = torch.randn(shape, dtype=torch.float64)
        return x.transpose(0, -1).contiguous().transpose(0, -1) if strided else x

    inputs = {"x": draw(*shape), "weight": 1 + 0.3 * torch.randn(shape[-weight_dims:], dtype=torch.float64)}
    if gate:
        inputs["gate"] = draw(*shape)
    if part:
        inputs["mean_square"] = 0.5 + torch.rand(*shape[:-1], 1, dtype=torch.float64)
    options = {"eps": 1e-5, "activation": torch.sigmoid if sigmoid else torch.nn.functional.silu}
    return Case("gated" if gate else "plain", rms_norm, inputs, options, wide=("mean_square",), channels=shape[-1])


CASES = [
    partial(norm, (7, 64)),
    partial(norm, (1, 5)),
    partial(norm, (0, 8)),
    partial(norm, (9, 3, 40), weight_dims=2, strided=True),
    partial(norm, (6, 33), part=True),
    partial(norm, (11, 4, 16), gate=True),
    partial(norm, (5, 3, 7), gate=True, sigmoid=True, strided=True),
    partial(norm, (0, 2, 8), gate=True),
]
