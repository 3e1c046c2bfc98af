"""What short convolutions and token shifts see of earlier ranks: the last inputs before each of this rank's spans.

Every rank hands on the last n inputs of the document that its span ends with, newest last, with zeros where it has
fewer. A span may be shorter than n, so the last n before a span may lie several ranks back:

    n = 3, one document     rank 0 | rank 1 | rank 2             . . 0  | . 1 2  | ...
    inputs                  0      | 1 2    | 3 4         rank 2 takes 0 from rank 0, then 1 2 from rank 1

They come in a gather of their own, ahead of the states': a state is made of what the convolutions put out, and the
first outputs of a span need these inputs, so one gather cannot bring both.

Letters: W ranks, R rows, L tokens of a span, C channels, n inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchlinearmoe.kernels.operator import outside_graphs
from torchlinearmoe.parallel.exchange.gather import finish_gather, start_gather
from torchlinearmoe.spans import Spans


@outside_graphs
def entering_inputs(
    parts: Sequence[Tensor], ids: Tensor, spans: Spans, count: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The `count` inputs before each of this rank's spans, [R, n, C], zeros before a document's start; and the parts
    [T, C] again, to go on with: then the gradient of what was handed on is added to theirs where it belongs."""
    device = spans.positions.device
    places_Rn = spans.starts_R1[1:].unsqueeze(1) + torch.arange(-count, 0, device=device)
    inside_Rn = places_Rn >= spans.starts_R1[:-1].unsqueeze(1)
    places_Rn = places_Rn.clamp(min=0)
    held_Rn1 = (inside_Rn & spans.in_last(ids)[places_Rn]).unsqueeze(-1)
    again, last = zip(*(_Last.apply(x, places_Rn, held_Rn1) for x in parts), strict=True)
    own = torch.cat(last, -1)
    counts_WR = spans.last_count_WR
    if counts_WR is None:  # they travel with the inputs, as one more channel
        held_R = torch.zeros(spans.rows, dtype=torch.int64, device=device)
        held_R = held_R.scatter_add(0, spans.row_T, spans.in_last(ids).long()).clamp(max=count)
        own = torch.cat([own, held_R.to(own.dtype).view(-1, 1, 1).expand(-1, count, 1)], -1)
    gathered = finish_gather(start_gather(own, spans.group))  # [W, R, n, C]
    if counts_WR is None:
        counts_WR, gathered = gathered[:, :, 0, -1].long(), gathered[..., :-1]
    chosen = _sources(spans.reaches_WR, counts_WR, count).to(own.dtype)
    entering = torch.matmul(chosen, gathered.transpose(0, 1).flatten(1, 2))
    return list(again), list(entering.split([x.shape[-1] for x in parts], -1))


class _Last(torch.autograd.Function):
    """x [T, C] and its rows at the places [R, n], zeros where they are not held."""

    @staticmethod
    def forward(ctx, x, places_Rn, held_Rn1):
        ctx.save_for_backward(places_Rn, held_Rn1)
        return x.view_as(x), torch.where(held_Rn1, x[places_Rn], 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, dlast):  # pyright: ignore[reportIncompatibleMethodOverride]
        places_Rn, held_Rn1 = ctx.saved_tensors
        # Of a convolution or a shift, and no one else's: to add a whole stream of zeros would cost what they do.
        dx = dx.clone() if 0 in dx.stride() else dx
        dx.index_add_(0, places_Rn.flatten(), torch.where(held_Rn1, dlast, 0.0).flatten(0, 1))
        return dx, None, None


def _sources(reaches_WR: Tensor, counts_WR: Tensor, count: int) -> Tensor:
    """1 where an input that enters, [R, n], is the one handed on in that place, [W n]; else 0: [R, n, W n]."""
    held_WR = torch.where(reaches_WR, counts_WR.clamp(max=count), 0)
    newer_WR = held_WR.flip(0).cumsum(0).flip(0) - held_WR
    age = torch.arange(count - 1, -1, -1, device=held_WR.device)
    # An input of age a is of age a - newer among the inputs of a rank, and that is its place from the right.
    age_RnW = age[None, :, None] - newer_WR.t()[:, None, :]
    own = (age_RnW >= 0) & (age_RnW < held_WR.t()[:, None, :])
    return (own.unsqueeze(-1) & (age_RnW.unsqueeze(-1) == age)).flatten(2)
