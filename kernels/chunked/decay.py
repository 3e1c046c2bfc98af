"""Products of decays, as exponentials of sums that are never positive.

A product of decays over tokens s+1..t is exp(G_t - G_s) with the running sum G. Dividing by a decay product overflows,
and subtracting two large sums loses the digits that matter: after one decay of e^-500, G_t - G_s = -500.01 + 500 keeps
four digits in fp32. So G is summed in fp64 (a number per token and head: cheap), and split into a whole part, exact in
fp32, and a rest of at most 1/2. Differences of whole parts are exact, and a difference near zero, the only kind whose
exponential is not negligible, is as exact as fp32 can be.
"""

import torch
from torch import Tensor

FLOOR = -1000.0
"""Log decays are clamped here: e^-1000 is zero in fp64 too, and sums over a chunk stay finite (-inf would not)."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of decays and states: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def running_sum(log_decay: Tensor, dim: int) -> Tensor:
    """The inclusive running sum of log decays (clamped to FLOOR) over `dim`, in fp64."""
    return log_decay.double().clamp(min=FLOOR).cumsum(dim)


def decay_matrix(to: Tensor, since: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(to_t - since_s) where `mask` allows it, else 0.

    to: [..., t]; since: [..., s], running sums in fp64; mask: bool, broadcasts to [..., t, s], and allows only
    differences <= 0. Returns [..., t, s] in `dtype`.
    """
    whole_to, whole_since = to.detach().round(), since.detach().round()
    rest_to, rest_since = (to - whole_to).to(dtype), (since - whole_since).to(dtype)
    lowest = -80.0 if dtype == torch.float32 else -700.0  # keeps clear of subnormal numbers, which are slow
    whole = whole_to.to(dtype).unsqueeze(-1) - whole_since.to(dtype).unsqueeze(-2)
    whole = whole.clamp(min=lowest).masked_fill(~mask, -torch.inf)
    return torch.exp(whole + (rest_to.unsqueeze(-1) - rest_since.unsqueeze(-2)))


def causal_mask(size: int, device: torch.device, diagonal: int = 0) -> Tensor:
    """[size, size] bool: row t sees column s <= t + diagonal."""
    return torch.ones(size, size, dtype=torch.bool, device=device).tril(diagonal)
