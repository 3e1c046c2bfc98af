"""The token shift as one displaced copy: no chunks, documents as a mask.

Legend: T tokens, D channels, N segments.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlinearmoe.kernels.operator import Backend
from torchlinearmoe.segments import Segments


def token_shift(
    x: Tensor, segments: Segments, initial_state: Tensor | None, want_final: bool
) -> tuple[Tensor, Tensor | None]:
    """As `definition.token_shift`."""
    goes_on = segments.view("goes_on", lambda segments: F.pad(segments.ids[1:] == segments.ids[:-1], (1, 0)))
    y = torch.where(goes_on.unsqueeze(-1), F.pad(x, (0, 0, 1, 0))[:-1], 0.0)
    if initial_state is None and not want_final:
        return y, None
    starts, ends = segments.borders[:-1].long(), segments.borders[1:].long()
    empty = (starts == ends).unsqueeze(-1)
    if initial_state is not None:
        first = torch.where(empty, 0.0, initial_state[:, 0].to(x.dtype))
        y = y.index_add(0, starts.clamp(max=x.shape[0] - 1), first)
    if not want_final:
        return y, None
    last = x[(ends - 1).clamp(min=0)]
    before = torch.zeros_like(last) if initial_state is None else initial_state[:, 0].to(x.dtype)
    return y, torch.where(empty, before, last).unsqueeze(1)


BACKEND = Backend("torch", token_shift, ("token_shift",), order=0, fused=True)
