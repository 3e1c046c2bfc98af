"""Causal softmax attention over packed documents, and over a key-value cache.

Backends: `sdpa` (torch scaled_dot_product_attention; block-diagonal masks by rows of the packed stream, any device),
`varlen` (FlashAttention over cu_seqlens, CUDA in half precision), `flex` (FlexAttention, CUDA). A window of w tokens
lets a query see itself and the w - 1 tokens before it; 0 stands for no window. Shapes: T tokens, H query heads, G
key-value heads (G divides H), d width of a query and key head, v of a value head, B sequences, M cache length.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = ("auto", "sdpa", "varlen", "flex")


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype, windowed: bool = False) -> str:
    """Resolve `auto`; raise ValueError where a backend cannot run, `windowed` where it must know windows."""
    half = dtype in (torch.bfloat16, torch.float16)
    if backend == "auto":
        if windowed and device.type == "cuda" and half and not _varlen_knows_windows():
            return "flex"
        return "varlen" if device.type == "cuda" and half else "sdpa"
    if backend not in BACKENDS:
        raise ValueError(f"model.attention_backend = '{backend}': legal: {', '.join(BACKENDS)}")
    if backend == "varlen" and not (device.type == "cuda" and half):
        raise ValueError("model.attention_backend = 'varlen': needs a GPU and bfloat16; use 'sdpa'")
    if backend == "varlen" and windowed and not _varlen_knows_windows():
        raise ValueError("model.attention_backend = 'varlen': this torch has it without windows; use 'flex'")
    if backend == "flex" and device.type != "cuda":
        raise ValueError("model.attention_backend = 'flex': its backward needs a GPU; use 'sdpa'")
    return backend


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
    backend: str = "auto",
    window: int = 0,
) -> Tensor:
    """Causal attention inside each document, over the last `window` tokens where it is not 0.

    q: [T, H, d]; k: [T, G, d]; v: [T, G, v]; ids: [T] document of each token; cu_seqlens: int32 [N + 1]; `longest`
    document in tokens; no document crosses a multiple of `row_length`. Returns [T, H, v].
    """
    window = 0 if window >= longest else window
    chosen = choose_backend(backend, q.device, q.dtype, window > 0)
    if chosen == "varlen":
        return _varlen(q, k, v, (cu_seqlens, cu_seqlens), (longest, longest), scale, window)
    rows = q.shape[0] // row_length
    q, k, v = (x.unflatten(0, (rows, row_length)).transpose(1, 2) for x in (q, k, v))
    groups = k.shape[1] != q.shape[1]
    row_ids = ids.unflatten(0, (rows, row_length))
    if chosen == "flex":
        out = _flex(q, k, v, row_ids, row_ids, scale, groups, window)
    elif cu_seqlens.shape[0] - 1 == rows and not window:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=groups)
    else:
        mask = _row_mask(row_ids, row_ids, window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=groups)
    return out.transpose(1, 2).flatten(0, 1)


def continued_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ids: Tensor,
    borders: Sequence[int],
    history: Sequence[int],
    scale: float,
    backend: str = "auto",
    window: int = 0,
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
    window = 0 if window >= max(seen) else window
    chosen = choose_backend(backend, q.device, q.dtype, window > 0)
    if chosen == "varlen":
        return _varlen(q, k, v, (_borders(pieces, q), _borders(seen, q)), (max(pieces), max(seen)), scale, window)
    keys = [length + earlier for earlier in history]
    parts = zip(q.split(length), k.split(keys), v.split(keys), ids.split(length), history)
    return torch.cat([_continued_row(*part, scale, chosen, window) for part in parts])


def _borders(lengths: Sequence[int], like: Tensor) -> Tensor:
    """int32 [N + 1] on the device of `like`."""
    host = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    host = host.pin_memory() if like.device.type == "cuda" else host
    return host.to(like.device, non_blocking=True)


def _continued_row(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor, history: int, scale: float, chosen: str, window: int
) -> Tensor:
    """One row, q: [L, H, d]; k, v: [history + L, G, d]; ids: [L]."""
    groups = k.shape[1] != q.shape[1]
    key_ids = torch.cat([ids[:1].expand(history), ids])
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    if chosen == "flex":
        out = _flex(q, k, v, ids[None], key_ids[None], scale, groups, window)
    else:
        mask = _row_mask(ids[None], key_ids[None], window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=groups)
    return out.squeeze(0).transpose(0, 1)


def cached_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_positions: Tensor,
    scale: float,
    *,
    key_positions: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """Attention of new tokens over a cache that already holds their keys and values.

    q: [B, T, H, d]; k_cache: [B, M, G, d]; v_cache: [B, M, G, v]; query_positions: [B, T], each query sees the keys up
    to its own position, the last `window` of them where it is not 0; key_positions: [B, M], default 0 .. M - 1,
    negative for entries that hold nothing. Returns [B, T, H, v].
    """
    queries = query_positions[:, None, :, None]
    if key_positions is None:
        keys = torch.arange(k_cache.shape[1], device=q.device)
        mask = keys <= queries
    else:
        keys = key_positions[:, None, None, :]
        mask = (keys <= queries) & (keys >= 0)
    if window:
        mask = mask & (keys > queries - window)
    q, k, v = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    groups = k.shape[1] != q.shape[1]
    # cuDNN makes a new plan for every cache length, on the host, which costs more than the attention.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=groups)
    return out.transpose(1, 2)


def _row_mask(ids: Tensor, key_ids: Tensor, window: int) -> Tensor:
    """bool [R, 1, L, M]: key s is in query t's document, not after it and in its window; the last L keys are theirs.

    ids: [R, L]; key_ids: [R, M].
    """
    earlier = key_ids.shape[1] - ids.shape[1]
    causal = torch.ones(ids.shape[1], key_ids.shape[1], dtype=torch.bool, device=ids.device).tril(earlier)
    if window:
        causal = causal.triu(earlier + 1 - window)
    return ((ids[:, :, None] == key_ids[:, None, :]) & causal)[:, None]


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    borders: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scale: float,
    window: int,
) -> Tensor:
    """borders: of queries and of keys; a document's last key belongs to its last query."""
    from torch.nn.attention.varlen import varlen_attn

    knows, value_width = _varlen_parameters(), v.shape[-1]
    if q.shape[-1] != value_width:
        # FlashAttention wants one width. Channels of zeros change no score and come back as zeros.
        width = max(q.shape[-1], value_width)
        q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
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
    out = varlen_attn(q, k, v, *borders, *longest, **options)  # pyright: ignore
    assert isinstance(out, Tensor)
    return out[..., :value_width]


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    """Keyword arguments that this torch's varlen_attn has; they grew from version to version."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen_knows_windows() -> bool:
    return "window_size" in _varlen_parameters()


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor,
    key_ids: Tensor,
    scale: float,
    groups: bool,
    window: int,
) -> Tensor:
    """q: [R, H, L, d]; k, v: [R, G, M, d]; ids: [R, L]; key_ids: [R, M]; the last L keys are the queries' own."""
    from torch.nn.attention.flex_attention import create_block_mask

    (rows, length), keys = ids.shape, key_ids.shape[1]
    earlier = keys - length

    def same_document(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        seen = (ids[b, t] == key_ids[b, s]) & (s <= t + earlier)
        return seen & (t + earlier - s < window) if window else seen

    mask = create_block_mask(same_document, rows, None, length, keys, device=str(q.device))
    out = _compiled_flex()(q, k, v, block_mask=mask, scale=scale, enable_gqa=groups)
    assert isinstance(out, Tensor)
    return out
