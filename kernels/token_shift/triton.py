"""The token shift by our Triton kernel: one read and one write each way, where PyTorch copies what it pads and masks.

An operator of torch.library whose gradient is itself with the tokens in the other direction. The compiler does as well
with the plain form, and fuses it with what mixes the two tokens, so "auto" takes this one outside of graphs.

Legend: T tokens, D channels, N segments.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from torchlinearmoe.kernels.operator import NARROW, Backend
from torchlinearmoe.kernels.token_shift.chunked import last_input
from torchlinearmoe.segments import Segments

CHANNELS, TOKENS = 256, 16
"""Of a tile."""


def token_shift(
    x: Tensor, segments: Segments, initial_state: Tensor | None, want_final: bool
) -> tuple[Tensor, Tensor | None]:
    """As `definition.token_shift`."""
    initial = None if initial_state is None else initial_state[:, 0].to(x.dtype)
    y = shift(x, initial, segments.ids, segments.borders, False)
    return y, last_input(x, initial, segments.borders) if want_final else None


@torch.library.custom_op("torchlinearmoe::token_shift", mutates_args=())
def shift(x: Tensor, initial: Tensor | None, ids: Tensor, borders: Tensor, back: bool) -> Tensor:
    """The token before each, or `back` the one after, [T, D]; x: [T, D]; initial: [N, D]; ids: [T]; borders: [N + 1].

    Not both `back` and `initial`.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _kernels().shift_tokens[-(-x.shape[1] // CHANNELS), -(-x.shape[0] // TOKENS)](
        x, ids.contiguous(), x if initial is None else initial.contiguous(), y, *x.shape, x.stride(0),
        OFFSET=1 if back else -1, HAS_INITIAL=initial is not None, B=CHANNELS, ROWS=TOKENS, num_warps=4,
    )  # fmt: skip
    return y


@shift.register_fake
def _(x, initial, ids, borders, back):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, initial, ids, borders, ctx.back = inputs
    ctx.has_initial = initial is not None
    ctx.save_for_backward(ids, borders)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    ids, borders = ctx.saved_tensors
    dinitial = None
    if ctx.has_initial:
        starts, empty = borders[:-1].long(), (borders[:-1] == borders[1:]).unsqueeze(-1)
        dinitial = torch.where(empty, 0.0, dy[starts.clamp(max=dy.shape[0] - 1)])
    return shift(dy, None, ids, borders, not ctx.back), dinitial, None, None, None


shift.register_autograd(_backward, setup_context=_save)


@functools.cache
def _kernels() -> Any:  # Triton turns numbers into its own constants
    return importlib.import_module("torchlinearmoe.kernels.token_shift.triton_kernels")


BACKEND = Backend(
    "triton",
    token_shift,
    ("token_shift",),
    order=10,
    dtypes=NARROW,
    devices=frozenset(("cuda",)),
    needs=("triton",),
    install="pip install triton",
)
