"""Softmax attention of new tokens over a cache that already holds their keys and values.

o_bt = sum over s of softmax_s(scale q_bt k_bs) v_bs, s over the entries of sequence b at positions up to the query's
own, the last `window` of them where it is not 0.

Shapes: B sequences, T new tokens, M cache length, H query heads, G key-value heads (G divides H), d width of a query
and key head, v of a value.
"""

from __future__ import annotations

from torch import Tensor

from torchlinearmoe.kernels.choose import choose
from torchlinearmoe.kernels.operator import Budget, Call, Operator

OPERATOR = Operator("cached_attention", ("cached_attention",))


def cached_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_positions: Tensor,
    scale: float,
    *,
    key_positions: Tensor | None = None,
    window: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Attention of the new tokens.

    q: [B, T, H, d]; k_cache: [B, M, G, d]; v_cache: [B, M, G, v]; query_positions: int [B, T]; key_positions: int
    [B, M], default 0 .. M - 1, negative for entries that hold nothing. Every query sees at least one key. Returns
    [B, T, H, v].
    """
    call = Call("cached_attention", q.device.type, q.dtype, q.shape[-1])
    return choose(OPERATOR, backend, call).run(q, k_cache, v_cache, query_positions, key_positions, scale, window)


def budget(
    batch: int, tokens: int, held: int, heads: int, kv_heads: int, width: int, value_width: int, itemsize: int = 2
) -> Budget:
    """Of `tokens` new tokens over `held` entries a sequence, the new ones among them."""
    queries = batch * tokens * heads
    pairs = queries * (held - (tokens - 1) / 2)
    cache = batch * held * kv_heads * (width + value_width) * itemsize
    moved = cache + queries * (width + value_width) * itemsize
    return Budget(2.0 * (width + value_width) * pairs, moved, backward_bytes=2 * moved, saved_bytes=moved)
