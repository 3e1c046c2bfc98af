"""FlexAttention: a kernel that Inductor writes, with masks by blocks of rows. CUDA, where alone it has a backward."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinearmoe.kernels.attention.rows import QueryRows, by_rows
from torchlinearmoe.kernels.operator import NARROW, Backend


def attend(q: Tensor, k: Tensor, v: Tensor, rows: QueryRows, scale: float, window: int) -> Tensor:
    """As `packed_attention`; k and v have the keys of `rows`."""
    from torch.nn.attention.flex_attention import create_block_mask

    grouped, value_width = k.shape[1] != q.shape[1], v.shape[-1]
    # Its products are of at least 16 channels. Those of zeros change no score and come back as zeros.
    q, k, v = (F.pad(x, (0, 16 - x.shape[-1])) if x.shape[-1] < 16 else x for x in (q, k, v))

    def of_rows(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, key_ids: Tensor) -> Tensor:
        (count, length), keys = ids.shape, key_ids.shape[1]
        earlier = keys - length

        def same_document(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
            seen = (ids[b, t] == key_ids[b, s]) & (s <= t + earlier)
            return seen & (t + earlier - s < window) if window else seen

        mask = create_block_mask(same_document, count, None, length, keys, device=str(q.device))
        out = _compiled()(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped, kernel_options=_options(q))
        assert isinstance(out, Tensor)
        return out

    return by_rows(of_rows, q, k, v, rows)[..., :value_width]


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
