"""The token shift as one displaced copy: no chunks, documents as a mask.

Legend: B rows, T tokens, D channels, N documents.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def token_shift(
    x: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`reference.token_shift.token_shift`; document_ids: [T], all that is read without states."""
    if cu_seqlens is None and document_ids is None:
        before = torch.zeros_like(x[:, :1]) if initial_state is None else initial_state.to(x.dtype)
        inputs = torch.cat([before, x], 1)
        return inputs[:, :-1], inputs[:, -1:].clone() if output_final_state else None
    if document_ids is None:
        assert cu_seqlens is not None
        positions = torch.arange(x.shape[1], device=x.device, dtype=cu_seqlens.dtype)
        document_ids = torch.searchsorted(cu_seqlens, positions, right=True)
    goes_on = F.pad(document_ids[1:] == document_ids[:-1], (1, 0))
    y = torch.where(goes_on.unsqueeze(-1), F.pad(x, (0, 0, 1, 0))[:, :-1], 0.0)
    if initial_state is None and not output_final_state:
        return y, None
    assert cu_seqlens is not None
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    empty = (starts == ends).unsqueeze(-1)
    if initial_state is not None:
        first = torch.where(empty, 0.0, initial_state[:, 0].to(x.dtype))
        y = y.index_add(1, starts.clamp(max=x.shape[1] - 1), first.unsqueeze(0))
    if not output_final_state:
        return y, None
    last = x[0, (ends - 1).clamp(min=0)]
    before = torch.zeros_like(last) if initial_state is None else initial_state[:, 0].to(x.dtype)
    return y, torch.where(empty, before, last).unsqueeze(1)
