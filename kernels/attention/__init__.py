"""Causal softmax attention over packed documents: o_t = sum over s of softmax_s(scale q_t k_s) v_s.

s goes over the keys of t's document up to t's own, the last `window` of them where it is not 0: a window of w tokens
lets a query see itself and the w - 1 tokens before it. `auto` takes FlashAttention over borders where it runs, and
masks by rows elsewhere.

Shapes: T tokens, H query heads, G key-value heads (G divides H), d width of a query and key head, v of a value.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from torchlinearmoe.kernels.attention.layout import Layout
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
    *,
    ids: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    row_length: int,
    scale: float,
    window: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Attention of documents that start empty.

    q: [T, H, d]; k: [T, G, d]; v: [T, G, v]; ids: [T] document of each token; cu_seqlens: int32 [N + 1]; `longest`
    document in tokens; no document crosses a multiple of `row_length`. Returns [T, H, v].
    """
    history = (0,) * (q.shape[0] // row_length)
    layout = Layout(ids, row_length, history, (cu_seqlens, cu_seqlens), (longest, longest))
    return _attend(q, k, v, layout, scale, window, backend)


def continued_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ids: Tensor,
    borders: Sequence[int],
    history: Sequence[int],
    scale: float,
    window: int = 0,
    backend: str = "auto",
) -> Tensor:
    """`packed_attention` of rows whose first documents started before them.

    Rows are of equal length, and `history[r]` keys stand before row r's own. q: [T, H, d]; k, v: [T + all history, G,
    d or v], row after row; ids: [T]; borders: where documents start in the T tokens, 0 .. T, rows' starts among them.
    Returns [T, H, v].
    """
    length = q.shape[0] // len(history)
    # What follows a document's border may see its own tokens and, in a row's first document, the history.
    pieces = [end - start for start, end in pairwise(borders)]
    first = {row * length: keys for row, keys in enumerate(history)}
    seen = [piece + first.get(start, 0) for piece, start in zip(pieces, borders)]
    on_device = (_borders(pieces, q), _borders(seen, q))
    layout = Layout(ids, length, tuple(history), on_device, (max(pieces), max(seen)))
    return _attend(q, k, v, layout, scale, window, backend)


def _borders(lengths: Sequence[int], like: Tensor) -> Tensor:
    """int32 [N + 1] on the device of `like`."""
    host = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    host = host.pin_memory() if like.device.type == "cuda" else host
    return host.to(like.device, non_blocking=True)


def _attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int, backend: str) -> Tensor:
    window = 0 if window >= layout.longest[1] else window
    chosen = choose(OPERATOR, backend, call(window, q.shape[-1], q.device.type, q.dtype))
    return chosen.run(q, k, v, layout, scale, window)


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
