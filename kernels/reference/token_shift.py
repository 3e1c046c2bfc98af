"""The token before: what RWKV mixes every token with.

Legend: B batch, T tokens, D channels, N documents.
"""

import torch
from torch import Tensor

from torchlinearmoe.kernels.reference.spans import document_spans


def token_shift(
    x: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y_t = x_{t-1}; the input before a document's start is its state (Peng et al. 2023, arXiv:2305.13048).

    x: [B, T, D]; initial_state: the input before the document, [N, 1, D] (default zeros); cu_seqlens: [N + 1], with
    B == 1. Returns y [B, T, D] and the last input of every document [N, 1, D] or None, both in x's dtype.
    """
    B, T, D = x.shape
    outputs, finals = [], []
    for document, (row, start, end) in enumerate(document_spans(B, T, cu_seqlens)):
        last_D = x.new_zeros(D) if initial_state is None else initial_state[document, 0].to(x.dtype)
        for t in range(start, end):
            outputs.append(last_D)
            last_D = x[row, t]
        finals.append(last_D[None])
    y = torch.stack(outputs).view(B, T, D) if outputs else torch.zeros_like(x)
    return y, torch.stack(finals) if output_final_state else None
