"""The short convolution as W shifted products: no chunks, no layout change, documents as masks.

Legend: T tokens, D channels, W kernel width, N segments.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlinearmoe.kernels.operator import Backend
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
    """As `definition.short_convolution`."""
    W = weight.shape[1]
    dtype = wide_type(x.dtype)
    wide, taps = x.to(dtype), weight.to(dtype).t()
    masks = segments.view(f"lags_{W}_{dtype.itemsize}", lambda segments: _lag_masks(segments.ids, W, dtype))
    y: Tensor = _ShiftedProducts.apply(F.pad(wide, (0, 0, W - 1, 0)), taps, masks)  # pyright: ignore
    if initial_state is not None and W > 1:
        y = _add_initial(y, initial_state.to(dtype), taps, segments.borders)
    final = last_inputs(x, initial_state, segments.borders, W) if want_final else None
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), final


class _ShiftedProducts(torch.autograd.Function):
    """y_t = sum over lags of taps[W - 1 - lag] * padded[t + W - 1 - lag] * masks[lag, t].

    padded: [W - 1 + T, D]; taps: [W, D]; masks: [W, T, 1]. By hand, because autograd would allocate a padded
    gradient for every lag.
    """

    @staticmethod
    def forward(ctx, padded, taps, masks):
        ctx.save_for_backward(padded, taps, masks)
        W, T = taps.shape[0], padded.shape[0] - taps.shape[0] + 1
        y = padded[W - 1 :] * taps[W - 1]
        for lag in range(1, W):
            shifted = padded[W - 1 - lag : W - 1 - lag + T]
            tap = taps[W - 1 - lag]
            # Not in place: torch 2.11 would compile a wrong backward.
            y = torch.addcmul(y, shifted, tap * masks[lag])
        return y

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        padded, taps, masks = ctx.saved_tensors
        W, T = taps.shape[0], dy.shape[0]
        d_padded, d_taps = torch.zeros_like(padded), []
        for lag in range(W - 1, -1, -1):
            dy_lag = dy if lag == 0 else dy * masks[lag]
            reach = slice(W - 1 - lag, W - 1 - lag + T)
            d_padded[reach].addcmul_(dy_lag, taps[W - 1 - lag])
            d_taps.append((dy_lag * padded[reach]).sum(0))
        return d_padded, torch.stack(d_taps), None


def _lag_masks(ids_T: Tensor, W: int, dtype: torch.dtype) -> Tensor:
    """[W, T, 1]: 1 where the token `lag` places back is of the same document."""
    masks = torch.zeros(W, ids_T.shape[0], 1, dtype=dtype, device=ids_T.device)
    for lag in range(W):
        masks[lag, lag:, 0] = ids_T[lag:] == ids_T[: ids_T.shape[0] - lag]
    return masks


def _add_initial(y: Tensor, state: Tensor, taps: Tensor, borders: Tensor) -> Tensor:
    """Add what the first W - 1 tokens of each document read from its state: token i, state[i:] by taps[: W - 1 - i]."""
    starts, ends = borders[:-1].long(), borders[1:].long()
    W1 = taps.shape[0] - 1
    reads = [(state[:, i:] * taps[: W1 - i]).sum(1) for i in range(W1)]
    offsets = torch.arange(W1, device=y.device)
    tokens = starts.unsqueeze(1) + offsets  # [N, W - 1]
    inside = (tokens < ends.unsqueeze(1)).unsqueeze(-1)
    tokens = tokens.clamp(max=y.shape[0] - 1).flatten()
    return y.index_add(0, tokens, (torch.stack(reads, 1) * inside).flatten(0, 1))


def last_inputs(x: Tensor, state: Tensor | None, borders: Tensor, W: int) -> Tensor:
    """The last W - 1 inputs of every document [N, W - 1, D], its state standing in before its start; x: [T, D]; state:
    [N, W - 1, D]; borders: [N + 1]."""
    starts, ends = borders[:-1].long(), borders[1:].long()
    offsets = torch.arange(W - 1, device=x.device)
    tokens = ends.unsqueeze(1) - (W - 1) + offsets
    inside = (tokens >= starts.unsqueeze(1)).unsqueeze(-1)
    inputs = x[tokens.clamp(min=0)]
    if state is None:
        return inputs * inside
    past = (ends - starts).clamp(max=W - 1).unsqueeze(1) + offsets  # the same places, counted in the state
    past = past.clamp(max=W - 2).unsqueeze(-1).expand(inputs.shape)
    return torch.where(inside, inputs, state.to(x.dtype).gather(1, past))


BACKEND = Backend("torch", short_convolution, ("convolution",), order=0, fused=True)
