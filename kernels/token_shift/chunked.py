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
    initial = None if initial_state is None else initial_state[:, 0].to(x.dtype)
    if initial is not None:
        starts, ends = segments.borders[:-1].long(), segments.borders[1:].long()
        first = torch.where((starts == ends).unsqueeze(-1), 0.0, initial)
        y = y.index_add(0, starts.clamp(max=x.shape[0] - 1), first)
    return y, last_input(x, initial, segments.borders) if want_final else None


def last_input(x: Tensor, initial: Tensor | None, borders: Tensor) -> Tensor:
    """The last input of every document [N, 1, D], its state where it has no tokens; initial: [N, D]; borders:
    [N + 1]."""
    starts, ends = borders[:-1].long(), borders[1:].long()
    last = x[(ends - 1).clamp(min=0)]
    before = torch.zeros_like(last) if initial is None else initial
    return torch.where((starts == ends).unsqueeze(-1), before, last).unsqueeze(1)


BACKEND = Backend("torch", token_shift, ("token_shift",), order=0, fused=True)
