"""The short causal depthwise convolution in front of many mixers.

Legend: B batch, T tokens, D channels, W kernel width, N documents.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlinearmoe.kernels.reference.spans import document_spans


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y_t = activation(bias + sum_j weight[:, j] x_{t - (W - 1) + j}); inputs before a document's start are its state.

    x: [B, T, D]; weight: [D, W], its last column meets the current token; bias: [D]; activation: None or "silu";
    initial_state: the W - 1 inputs before the document, oldest first, [N, W - 1, D] (default zeros);
    cu_seqlens: [N + 1], with B == 1. Returns y [B, T, D] in x's dtype and the last W - 1 inputs of every document
    [N, W - 1, D] in x's dtype, or None.
    """
    B, T, D = x.shape
    W = weight.shape[1]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    outputs, finals = [], []
    for document, (row, start, end) in enumerate(document_spans(B, T, cu_seqlens)):
        before = x.new_zeros(W - 1, D) if initial_state is None else initial_state[document].to(x.dtype)
        window_TD = torch.cat([before, x[row, start:end]])
        for t in range(end - start):
            y_D = (window_TD[t : t + W].to(dtype) * weight.t().to(dtype)).sum(0)
            y_D = y_D if bias is None else y_D + bias.to(dtype)
            outputs.append(F.silu(y_D) if activation == "silu" else y_D)
        finals.append(window_TD[end - start :])
    y = torch.stack(outputs).view(B, T, D).to(x.dtype) if outputs else torch.zeros_like(x)
    return y, torch.stack(finals) if output_final_state else None
