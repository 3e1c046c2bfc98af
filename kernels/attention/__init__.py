"""Causal softmax attention over packed documents: o_t = sum over s of softmax_s(scale q_t k_s) v_s.

s goes over the keys of t's document up to t's own, the last `window` of them where it is not 0: a window of w tokens
lets a query see itself and the w - 1 tokens before it. `auto` takes FlashAttention over borders where it runs, and
masks by rows elsewhere.

Shapes: T tokens, H query heads, G key-value heads (G divides H), d width of a query and key head, v of a value.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from torchlinearmoe.documents import Documents
from torchlinearmoe.kernels.attention.rows import query_rows
from torchlinearmoe.kernels.choose import choose
from torchlinearmoe.kernels.operator import Budget, Call, Operator

OPERATOR = Operator("attention", ("packed", "windowed"), key="model.attention_backend")


def call(window: int, width: int, device: str, dtype: torch.dtype) -> Call:
    """What the choice of a backend rests on; width: d."""
    return Call("windowed" if window else "packed", device, dtype, width)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    *,
    scale: float,
    window: int = 0,
    history: tuple[int, ...] = (),
    backend: str = "auto",
) -> Tensor:
    """Attention inside every document.

    q: [T, H, d]; k: [S, G, d]; v: [S, G, v]; S = T where documents start empty. With `history` the first document of
    row r started history[r] keys before it; keys and values then lie row after row, those before a row's own first:
    S = T + all history. Returns [T, H, v].
    """
    rows = query_rows(documents, history)
    window = 0 if window >= rows.longest[1] else window
    chosen = choose(OPERATOR, backend, call(window, q.shape[-1], q.device.type, q.dtype))
    return chosen.run(q, k, v, rows, scale, window)


def budget(
    lengths: Iterable[int], heads: int, kv_heads: int, width: int, value_width: int, window: int = 0, itemsize: int = 2
) -> Budget:
    """Of `packed_attention` over documents of `lengths` tokens, in numbers of `itemsize` bytes."""
    lengths = list(lengths)
    tokens, pairs = sum(lengths), sum(seen_pairs(length, window) for length in lengths)
    inputs = tokens * (heads * width + kv_heads * (width + value_width)) * itemsize
    outputs = tokens * heads * value_width * itemsize
    totals = 4.0 * tokens * heads  # a row's log-sum-exp, float32
    return Budget(
        flops=2.0 * heads * (width + value_width) * pairs,
        forward_bytes=inputs + outputs + totals,
        backward_bytes=2 * inputs + 2 * outputs + totals,
        saved_bytes=inputs + outputs + totals,
    )


def seen_pairs(length: int, window: int = 0) -> int:
    """Pairs of a query and a key that it sees, in a document of `length` tokens."""
    reach = min(window or length, length)
    return reach * length - reach * (reach - 1) // 2
