"""The short causal depthwise convolution in front of many mixers.

Legend: T tokens, D channels, W kernel width, N segments.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlinearmoe.kernels.operator import Backend
from torchlinearmoe.kernels.tokens import documents_of
from torchlinearmoe.precision import wide_type
from torchlinearmoe.segments import Segments


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    segments: Segments,
    initial_state: Tensor | None,
    want_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """y_t = activation(bias + sum_j weight[:, j] x_{t - (W - 1) + j}); earlier inputs are the state."""
    W = weight.shape[1]
    dtype = wide_type(x.dtype)
    outputs, finals = [], []
    for document, (start, end) in enumerate(documents_of(segments)):
        before = x.new_zeros(W - 1, x.shape[1]) if initial_state is None else initial_state[document].to(x.dtype)
        window_TD = torch.cat([before, x[start:end]])
        for t in range(end - start):
            y_D = (window_TD[t : t + W].to(dtype) * weight.t().to(dtype)).sum(0)
            y_D = y_D if bias is None else y_D + bias.to(dtype)
            outputs.append(F.silu(y_D) if activation == "silu" else y_D)
        finals.append(window_TD[end - start :])
    return torch.stack(outputs).to(x.dtype), torch.stack(finals) if want_final else None


BACKEND = Backend("reference", short_convolution, ("convolution",))
