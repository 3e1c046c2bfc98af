"""FlashAttention over borders: nothing is padded or masked. CUDA in half precision."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinearmoe.kernels.attention.rows import QueryRows
from torchlinearmoe.kernels.operator import Backend, Call


def attend(q: Tensor, k: Tensor, v: Tensor, rows: QueryRows, scale: float, window: int) -> Tensor:
    """As `packed_attention`; k and v have the keys of `rows`."""
    from torch.nn.attention.varlen import varlen_attn

    knows, value_width = parameters(), v.shape[-1]
    # FlashAttention wants one width, a multiple of 8. Channels of zeros change no score and come back as zeros.
    width = -(-max(q.shape[-1], value_width) // 8) * 8
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))
    options: dict[str, object] = {"window_size": (window - 1, 0)} if "window_size" in knows else {"is_causal": True}
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in knows:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if "scale" in knows:
        options["scale"] = scale
    else:
        q = q * (scale * q.shape[-1] ** 0.5)
    out = varlen_attn(q, k, v, *rows.borders, *rows.longest, **options)  # pyright: ignore
    assert isinstance(out, Tensor)
    return out[..., :value_width]


@functools.cache
def parameters() -> frozenset[str]:
    """Keyword arguments that this torch's varlen_attn has; they grew from version to version."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def refuse(call: Call) -> str | None:
    """Windows, where this torch has none, and wide heads."""
    if call.kind == "windowed" and "window_size" not in parameters():
        return "this torch has it without windows; use 'auto' or 'flex'"
    return "it takes heads of at most 256 channels" if call.channels > 256 else None


BACKEND = Backend(
    "varlen",
    attend,
    kinds=("packed", "windowed"),
    order=2,
    dtypes=frozenset((torch.bfloat16, torch.float16)),
    devices=frozenset(("cuda",)),
    kept=("aten::_flash_attention_forward", "torch_attn::_varlen_attn"),
    refuses=refuse,
)
