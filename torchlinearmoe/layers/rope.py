"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), and its scalings for contexts beyond the trained one.

Pair i of a head of width d turns by position * theta^(-2i/d). A scaling slows the pairs that turn less than about once
over the original length, by `factor`, and leaves the fast ones:

    turns over the original length      <= beta_slow     between            >= beta_fast
    frequency                           f / factor       a mixture of both  f

Llama 3.1 mixes linearly in the turns, YaRN (Peng et al. 2023, arXiv 2309.00071, eq. 23) linearly in the pair's index;
YaRN also sharpens attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlinearmoe.precision import wide_type


@dataclass(frozen=True)
class RopeScaling:
    """A scaling of the rotary frequencies; see the module's docstring."""

    kind: str
    """`llama3` or `yarn`."""
    factor: float
    original_length: int
    beta_slow: float
    beta_fast: float
    mscale: float = 0.0
    """YaRN: attention's sharpening on the rotated channels; 0 with `mscale_all_dim` = 0 is the paper's."""
    mscale_all_dim: float = 0.0
    """YaRN: the part of it that multiplies all scores instead, squared, in mixers that know it (MLA)."""

    def frequencies(self, dim: int, theta: float, device: torch.device | None = None) -> Tensor:
        """float64 [dim / 2], radians a token of each pair."""
        plain = frequencies(dim, theta, device)
        if self.kind == "llama3":
            turns = self.original_length * plain / (2 * math.pi)
            keep = (turns - self.beta_slow) / (self.beta_fast - self.beta_slow)
        else:
            first, last = (self._pair(turns, dim, theta) for turns in (self.beta_fast, self.beta_slow))
            low = max(math.floor(first), 0)
            high = max(min(math.ceil(last), dim - 1), low)
            pairs = torch.arange(dim // 2, dtype=torch.float64, device=device)
            keep = 1 - (pairs - low) / (high - low or 0.001)
        keep = keep.clamp(0, 1)
        return plain * (keep + (1 - keep) / self.factor)

    def _pair(self, turns: float, dim: int, theta: float) -> float:
        """The (fractional) pair that turns `turns` times over the original length."""
        return dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    @property
    def amplitude(self) -> float:
        """What the rotated channels are multiplied by, on queries and keys alike."""
        if self.kind != "yarn":
            return 1.0
        if self.mscale and self.mscale_all_dim:
            return self._sharpening(self.mscale) / self._sharpening(self.mscale_all_dim)
        return self._sharpening(1.0)

    @property
    def score_factor(self) -> float:
        """What all scores are multiplied by where the mixer leaves `mscale_all_dim` out of the rotation."""
        return self._sharpening(self.mscale_all_dim) ** 2 if self.kind == "yarn" else 1.0

    def _sharpening(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0


def frequencies(dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """float64 [dim / 2], radians a token of each pair, without scaling."""
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + d/2]) of every head, the half-split layout of most published models.

    x: [T, H, d]; cosines, sines: [T, d/2]. Computed in float32 (float64 stays), returned in x's type.
    """
    kind = wide_type(x.dtype)
    first, second = x.to(kind).chunk(2, dim=-1)
    cosines, sines = cosines.to(kind)[:, None], sines.to(kind)[:, None]
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1).to(x.dtype)


def rotate_first(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """`rotate` the first channels of every head, as many as the tables are for, and leave the others."""
    dim = 2 * cosines.shape[-1]
    if dim == x.shape[-1]:
        return rotate(x, cosines, sines)
    return torch.cat([rotate(x[..., :dim], cosines, sines), x[..., dim:]], dim=-1)


def rotate_interleaved(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate the pairs (x[2i], x[2i + 1]) of every head, the layout of the DeepSeek models.

    Shapes and types as in `rotate`.
    """
    kind = wide_type(x.dtype)
    first, second = x.to(kind).unflatten(-1, (-1, 2)).unbind(-1)
    cosines, sines = cosines.to(kind)[:, None], sines.to(kind)[:, None]
    pairs = torch.stack([first * cosines - second * sines, second * cosines + first * sines], dim=-1)
    return pairs.flatten(-2).to(x.dtype)
