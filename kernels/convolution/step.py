"""The short convolution of one token a document: decoding."""

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlinearmoe.kernels.operator import Backend
from torchlinearmoe.precision import wide_type
from torchlinearmoe.segments import Segments


def convolution_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    segments: Segments,
    initial_state: Tensor,
    want_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """As the operator, with T = N; the new state leaves the old one alone."""
    dtype = wide_type(x.dtype)
    window = torch.cat([initial_state.to(x.dtype), x.unsqueeze(1)], 1)
    y = (window.to(dtype) * weight.t().to(dtype)).sum(1)
    y = y if bias is None else y + bias.to(dtype)
    y = F.silu(y) if activation == "silu" else y
    return y.to(x.dtype), window[:, 1:] if want_final else None


BACKEND = Backend("step", convolution_step, ("convolution",), order=0, fused=True, single=True)
