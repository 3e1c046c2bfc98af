"""The products on either side of the gates, with the gates in them: our Triton kernels for Hopper.

A grouped product that writes 2 F numbers a row, for a pass that reads them and writes F, and one that writes F, for a
pass that reads 3 F and writes 3 F: both products can do the pass where the numbers still are in registers, and can read
the tokens of their rows where they lie. Bytes of memory, for R rows, of products and passes, weights left out:

    into the gates     gather x, product, gate   D + D + 2 F + 2 F + F      here   D (from cache) + 2 F + F
    back through them  product, gates' pass      D + F + 3 F + 3 F          here   D (from cache) + 2 F + 3 F

R = 131072, D = 1024, F = 896, bfloat16: 2 D + 2 F of 1.75 and 2 F of 1.88 GB are spared, 0.24 and 0.11 ms at 4.2 TB/s.
The products themselves, 0.48 and 0.24 TFLOP, take 0.73 and 0.37 ms at what `F.grouped_mm` reaches, 656 TFLOP/s: ours
are ahead from 495 and 505 TFLOP/s on.

T tokens, k experts a token, R = T * k rows, D model width, F expert width, E experts.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchlinearmoe.kernels.dispatch.triton import readable

NARROWEST = 64
"""What divides both widths: operands of 128 bytes a row, the only ones that every ptxas multiplies rightly."""


class Tile(NamedTuple):
    """Of a product, for one program."""

    rows: int
    channels: int
    """At most: the largest of it and its halves that divides F."""
    inner: int
    warps: int
    stages: int
    registers: int | None = None
    """Of a thread, where two programs are to share a processor."""


INTO = Tile(rows=128, channels=128, inner=64, warps=8, stages=4)
BACK = Tile(rows=128, channels=128, inner=64, warps=8, stages=3, registers=128)
AT_ONCE, HOT = 64, 8192
"""Tiles that one program finds, at most, and elements of tiles by experts."""


def takes(x_TD: Tensor, hidden: int) -> bool:
    """Whether the products are ours: 16 bits, widths of whole tiles, a chip that they were compiled and timed for."""
    whole = x_TD.shape[1] % NARROWEST == 0 and hidden % NARROWEST == 0
    return whole and x_TD.shape[0] > 0 and x_TD.dtype.itemsize == 2 and _is_hopper(x_TD.device)


def into_gates(
    x_TD: Tensor, order_R: Tensor, weights_Tk: Tensor, gate_up_EDF: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor]:
    """[gate | up] of the rows [R, 2F], and w silu(gate) up [R, F]; rows of no expert are left as they are."""
    x_TD, matrices, R = readable(x_TD), _side_by_side(gate_up_EDF), order_R.shape[0]
    D, F = x_TD.shape[1], matrices.shape[2] // 2
    BN = _channels(F, INTO)
    gate_up_RF, hidden_RF = x_TD.new_empty(R, 2 * F), x_TD.new_empty(R, F)
    tiles = _tiles(offsets_E, R, INTO.rows)
    _kernels().grouped_mm_gated[(tiles.shape[0] * (F // BN),)](
        x_TD, order_R, weights_Tk.contiguous(), matrices, tiles, offsets_E, gate_up_RF, hidden_RF, D, F, x_TD.stride(0),
        matrices.stride(0), matrices.stride(1), K=weights_Tk.shape[1], **_options(INTO, BN),
    )  # fmt: skip
    return gate_up_RF, hidden_RF


def back_through_gates(
    dy_TD: Tensor,
    order_R: Tensor,
    weights_Tk: Tensor,
    down_EFD: Tensor,
    offsets_E: Tensor,
    gate_up_RF: Tensor,
    limited: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of [gate | up] and w silu(gate) up again, of the rows; the gradient of the weights [T, k].

    limited: there may be rows of no expert, whose weights' gradient is 0.
    """
    dy_TD, matrices, R = readable(dy_TD), _side_by_side(down_EFD), order_R.shape[0]
    _, F, D = matrices.shape
    BN = _channels(F, BACK)
    dgate_up_RF, hidden_RF = torch.empty_like(gate_up_RF), gate_up_RF.new_empty(R, F)
    make = torch.zeros if limited else torch.empty
    parts = make(F // BN, R, dtype=torch.float32, device=dy_TD.device)
    tiles = _tiles(offsets_E, R, BACK.rows)
    _kernels().grouped_mm_gated_backward[(tiles.shape[0] * (F // BN),)](
        dy_TD, order_R, weights_Tk.contiguous(), matrices, tiles, offsets_E, gate_up_RF, dgate_up_RF, hidden_RF, parts,
        R, D, F, dy_TD.stride(0), matrices.stride(0), matrices.stride(1), K=weights_Tk.shape[1], **_options(BACK, BN),
    )  # fmt: skip
    return dgate_up_RF, hidden_RF, parts.sum(0).view_as(weights_Tk).to(weights_Tk.dtype)


def _tiles(offsets_E: Tensor, rows: int, height: int) -> Tensor:
    """Expert and first row of every tile, int32 [as many as there can be, 2]."""
    E = offsets_E.shape[0]
    count = -(-rows // height) + E
    tiles = torch.empty(count, 2, dtype=torch.int32, device=offsets_E.device)
    bins = max(16, 1 << (E - 1).bit_length())
    at_once = max(1, min(AT_ONCE, HOT // bins))
    _kernels().sort_tiles[(-(-count // at_once),)](
        offsets_E, tiles, count, E, BM=height, BINS=bins, AT_ONCE=at_once, num_warps=4
    )
    return tiles


def _options(tile: Tile, channels: int) -> dict[str, Any]:
    options: dict[str, Any] = {"BM": tile.rows, "BN": channels, "BK": tile.inner}
    options |= {"num_warps": tile.warps, "num_stages": tile.stages}
    return options if tile.registers is None else options | {"maxnreg": tile.registers}


def _channels(hidden: int, tile: Tile) -> int:
    channels = tile.channels
    while hidden % channels:
        channels //= 2
    return channels


def _side_by_side(w_EMN: Tensor) -> Tensor:
    return w_EMN if w_EMN.stride(2) == 1 else w_EMN.contiguous()


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    """Or no chip at all, where Triton is interpreted."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def _kernels() -> Any:  # Triton turns numbers into its own constants
    return importlib.import_module("torchlinearmoe.kernels.experts.triton_kernels")
