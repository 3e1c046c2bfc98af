"""FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608), its own package: Hopper's kernels over borders.

Not on the Python package index: it is built from FlashAttention's `hopper` folder.
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinearmoe.kernels.attention.rows import QueryRows
from torchlinearmoe.kernels.operator import Backend, Call, Defect, outside_graphs

KINDS = ("packed", "windowed")


@outside_graphs
def attend(q: Tensor, k: Tensor, v: Tensor, rows: QueryRows, scale: float, window: int) -> Tensor:
    """As `packed_attention`; k and v have the keys of `rows`."""
    width, value_width = widths(q.shape[-1], v.shape[-1])
    o = importlib.import_module("flash_attn_interface").flash_attn_varlen_func(
        *(F.pad(x, (0, width - x.shape[-1])) for x in (q, k)),
        F.pad(v, (0, value_width - v.shape[-1])),
        *rows.borders,
        *rows.longest,
        softmax_scale=scale,
        causal=True,
        window_size=(window - 1, 0) if window else (-1, -1),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return (o[0] if isinstance(o, tuple) else o)[..., : v.shape[-1]]


def widths(width: int, value_width: int) -> tuple[int, int]:
    """The widths of keys and values that it takes instead: of the same multiple of 8, or of two in a few ranges.

    Channels of zeros change no score and come back as zeros.
    """
    width, value_width = (-(-n // 8) * 8 for n in (width, value_width))
    if (128 < width <= 192 and 96 < value_width <= 128) or (width <= 64 and value_width <= 512):
        return width, value_width
    wider = max(width, value_width)
    return wider, wider


def refuse(call: Call) -> str | None:
    """Wide heads."""
    return "it takes heads of at most 256 channels" if call.channels > 256 else None


def other_gpus(since: tuple[int, int], until: tuple[int, int]) -> Defect:
    """What refuses GPUs of such compute capabilities."""
    versions = (since, until)
    return Defect(frozenset(KINDS), versions, ((), (99,)), "its kernels are not for this GPU", "use 'auto' or 'varlen'")


BACKEND = Backend(
    "flash3",
    attend,
    kinds=KINDS,
    dtypes=frozenset((torch.bfloat16, torch.float16)),
    devices=frozenset(("cuda",)),
    needs=("flash_attn_interface",),
    install="build FlashAttention-3 from its folder 'hopper'",
    refuses=refuse,
    defects=(other_gpus((0, 0), (9, 0)), other_gpus((10, 0), (99, 0))),
)
