"""FlexAttention: a kernel that Inductor writes, with masks by blocks of rows. CUDA, where alone it has a backward."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinearmoe.kernels.attention.blocks import BLOCK, seen_blocks
from torchlinearmoe.kernels.attention.rows import QueryRows, by_rows
from torchlinearmoe.kernels.operator import NARROW, Backend


def attend(q: Tensor, k: Tensor, v: Tensor, rows: QueryRows, scale: float, window: int) -> Tensor:
    """As `packed_attention`; k and v have the keys of `rows`."""
    grouped, value_width = k.shape[1] != q.shape[1], v.shape[-1]
    # Its products are of at least 16 channels. Those of zeros change no score and come back as zeros.
    q, k, v = (F.pad(x, (0, 16 - x.shape[-1])) if x.shape[-1] < 16 else x for x in (q, k, v))
    row = 0

    def of_rows(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, key_ids: Tensor) -> Tensor:
        nonlocal row
        name, row = ("flex", row, window), row + 1
        if name not in rows.made:
            rows.made[name] = block_mask(ids, key_ids, window)
        mask = rows.made[name]
        out = _compiled()(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped, kernel_options=_options(q))
        assert isinstance(out, Tensor)
        return out

    return by_rows(of_rows, q, k, v, rows)[..., :value_width]


def block_mask(ids: Tensor, key_ids: Tensor, window: int) -> Any:
    """The BlockMask of rows whose queries and keys are of the documents `ids` [R, L] and `key_ids` [R, M]."""
    from torch.nn.attention.flex_attention import BlockMask

    length, keys = ids.shape[1], key_ids.shape[1]
    earlier = keys - length

    def same_document(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        seen = (ids[b, t] == key_ids[b, s]) & (s <= t + earlier)
        return seen & (t + earlier - s < window) if window else seen

    seen = seen_blocks(ids, earlier, window)
    return BlockMask.from_kv_blocks(*seen, BLOCK_SIZE=BLOCK, mask_mod=same_document, seq_lengths=(length, keys))


def _options(q: Tensor) -> Any:
    """Not its decoding kernel, which takes rows of less than 128 tokens and has no choices for some grouped heads; of
    float32, no tiles that are loaded ahead: they do not fit."""
    return {"BACKEND": "TRITON"} | ({"num_stages": 1} if q.dtype == torch.float32 else {})


@functools.cache
def _compiled():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


BACKEND = Backend(
    "flex",
    attend,
    kinds=("packed", "windowed"),
    order=1,
    dtypes=NARROW,
    devices=frozenset(("cuda",)),
    exact=False,  # TF32 where torch.set_float32_matmul_precision allows it
)
