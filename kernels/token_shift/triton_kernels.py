"""The Triton kernel of y_t = x_{t + offset} where both tokens are of one document, by its tiles.

x: [T, D] with rows of any stride; ids: [T]; initial: [N, D], what the first token of a document reads instead of 0.
"""

# pyright: basic, reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def shift_tokens(
    x, ids, initial, y, T, D, stride,
    OFFSET: tl.constexpr, HAS_INITIAL: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of channels, tiles of tokens."""
    columns = tl.program_id(0) * B + tl.arange(0, B)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = (t < T)[:, None] & (columns < D)[None, :]
    source = t + OFFSET
    document = tl.load(ids + t, mask=t < T, other=-1)
    same = (document == tl.load(ids + source, mask=(source >= 0) & (source < T), other=-1))[:, None]
    values = tl.load(x + source.to(tl.int64)[:, None] * stride + columns[None, :], mask=same & inside, other=0.0)
    if HAS_INITIAL:
        states = initial + document.to(tl.int64)[:, None] * D + columns[None, :]
        values = tl.where(same, values, tl.load(states, mask=(same == 0) & inside, other=0.0))
    tl.store(y + t.to(tl.int64)[:, None] * D + columns[None, :], values, mask=inside)
