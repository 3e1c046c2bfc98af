"""The token before: what RWKV mixes every token with.

Legend: T tokens, D channels, N segments.
"""

import torch
from torch import Tensor

from torchlinearmoe.kernels.operator import Backend
from torchlinearmoe.kernels.tokens import documents_of
from torchlinearmoe.segments import Segments


def token_shift(
    x: Tensor, segments: Segments, initial_state: Tensor | None, want_final: bool
) -> tuple[Tensor, Tensor | None]:
    """y_t = x_{t-1}; the input before a document's start is its state (Peng et al. 2023, arXiv:2305.13048)."""
    outputs, finals = [], []
    for document, (start, end) in enumerate(documents_of(segments)):
        last_D = x.new_zeros(x.shape[1]) if initial_state is None else initial_state[document, 0].to(x.dtype)
        for t in range(start, end):
            outputs.append(last_D)
            last_D = x[t]
        finals.append(last_D[None])
    return torch.stack(outputs), torch.stack(finals) if want_final else None


BACKEND = Backend("reference", token_shift, ("token_shift",))
