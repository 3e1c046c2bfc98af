"""Triton kernels that sort assignments by expert and move rows of tokens; every result is written once, by one program.

Sorting counts, in two launches. A block is `span` assignments, in tiles of S; T = 3 tokens, k = 2 as in the package's
example, with a span of 2:

    ids [[2, 0], [0, 1], [2, 1]]      counts by block  [1 0 1] [1 1 0] [0 1 1]      of all  [2 2 2]

Then each block reads the counts of all. The row of an assignment is what is before it of the experts before its own, of
its own in the blocks before, in the block's tiles before, and in its tile. So rows of an expert are in the order of
their assignments, whatever runs first, and nothing waits for the host.

Tokens are read once and written to their rows, whose places all differ; sums read their rows by index: no atomic
additions. Rows from `limit` on, where there is one, belong to no expert: they are not read, count as zeros, and are not
written.

T tokens, k experts a token, R = T * k rows, D width, E experts.
"""

# Constants of the compiler are not what Python takes them for.
# pyright: basic, reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def _experts(ids, keep, at, end, E: tl.constexpr, DROPS: tl.constexpr):
    """The expert of each assignment, E where it is dropped, -1 past the end: [S]."""
    inside = at < end
    expert = tl.load(ids + at, mask=inside, other=-1).to(tl.int32)
    if DROPS:
        kept = tl.load(keep + at, mask=inside, other=1)
        expert = tl.where(kept != 0, expert, E)
    return expert


@triton.jit(do_not_specialize=["R"])
def sort_count(
    ids, keep, block_counts, R, span,
    E: tl.constexpr, DROPS: tl.constexpr, S: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Grid: blocks. block_counts: int32 [blocks, BINS]; bin E has those that are dropped."""
    block, bins = tl.program_id(0), tl.arange(0, BINS)
    end = tl.minimum((block + 1) * span, R)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(block * span, end, S):
        expert = _experts(ids, keep, start + tl.arange(0, S), end, E, DROPS)
        counts += tl.sum((expert[:, None] == bins[None, :]).to(tl.int32), 0)
    tl.store(block_counts + block * BINS + bins, counts)


@triton.jit(do_not_specialize=["R", "blocks"])
def sort_scatter(
    ids, keep, block_counts, order, inverse, counts, offsets, R, span, blocks,
    E: tl.constexpr, DROPS: tl.constexpr, S: tl.constexpr, BINS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Grid: blocks. order, inverse: int64 [R]; counts: int64 [E]; offsets: int32 [E], their running sums."""
    block, bins = tl.program_id(0), tl.arange(0, BINS)
    before, total = tl.zeros([BINS], tl.int32), tl.zeros([BINS], tl.int32)
    for first in range(0, blocks, AT_ONCE):
        others = first + tl.arange(0, AT_ONCE)
        found = tl.load(block_counts + others[:, None] * BINS + bins[None, :], mask=(others < blocks)[:, None], other=0)
        total += tl.sum(found, 0)
        before += tl.sum(tl.where((others < block)[:, None], found, 0), 0)
    ends = tl.cumsum(total, 0)
    if block == 0:
        tl.store(counts + bins, total.to(tl.int64), mask=bins < E)
        tl.store(offsets + bins, ends, mask=bins < E)
    row = ends - total + before  # of the next assignment to each
    end = tl.minimum((block + 1) * span, R)
    for start in range(block * span, end, S):
        at = start + tl.arange(0, S)
        expert = _experts(ids, keep, at, end, E, DROPS)
        hot = (expert[:, None] == bins[None, :]).to(tl.int32)
        rows = tl.sum(hot * (row[None, :] + tl.cumsum(hot, 0) - 1), 1)
        tl.store(order + rows, at.to(tl.int64), mask=at < end)
        tl.store(inverse + at, rows.to(tl.int64), mask=at < end)
        row += tl.sum(hot, 0)


@triton.jit(do_not_specialize=["T"])
def scatter_tokens(
    x, inverse, limit, y, T, D, stride,
    K: tl.constexpr, LIMITED: tl.constexpr, TOKENS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """y[inverse[t, j]] = x[t], a token read once. Grid: tiles of tokens, blocks of columns; y: [R, D], contiguous."""
    t, columns = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1) * B + tl.arange(0, B)
    inside, within = t < T, (columns < D)[None, :]
    t = t.to(tl.int64)
    values = tl.load(x + t[:, None] * stride + columns[None, :], mask=inside[:, None] & within)
    for j in tl.static_range(K):
        row = tl.load(inverse + t * K + j, mask=inside, other=0)
        there = inside
        if LIMITED:
            there = inside & (row < tl.load(limit))
        tl.store(y + row[:, None] * D + columns[None, :], values, mask=there[:, None] & within)


@triton.jit(do_not_specialize=["T"])
def gather_sum(
    rows, weights, inverse, limit, y, T, D, stride,
    K: tl.constexpr, WEIGHTED: tl.constexpr, LIMITED: tl.constexpr, TOKENS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """y_t = sum_j [w[t, j]] rows[inverse[t, j]] in float32, in the order of j.

    Grid: tiles of tokens, blocks of columns. weights, inverse: [T, K], y: [T, D], contiguous.
    """
    t, columns = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1) * B + tl.arange(0, B)
    inside = t < T
    total = tl.zeros([TOKENS, B], tl.float32)
    for j in tl.static_range(K):
        row = tl.load(inverse + t.to(tl.int64) * K + j, mask=inside, other=0)
        there = inside
        if LIMITED:
            there = inside & (row < tl.load(limit))
        mask = there[:, None] & (columns < D)[None, :]
        value = tl.load(rows + row[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + t.to(tl.int64) * K + j, mask=inside, other=0.0).to(tl.float32)[:, None]
        total += value
    places = t.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(y + places, total.to(y.dtype.element_ty), mask=inside[:, None] & (columns < D)[None, :])


@triton.jit(do_not_specialize=["R"])
def gather_weighted(
    rows, weights, order, dy, drows, dweights, R, D, stride, stride_dy,
    K: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The gradients of a weighted sum: drows[r] = w g and dw = rows[r] . g for g = dy of row r's token, in one pass.

    Grid: tiles of rows. rows, dy: rows of any stride; weights, dweights: [T, K], drows: [R, D], contiguous.
    """
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = r < R
    assignment = tl.load(order + r, mask=inside, other=0)
    weight = tl.load(weights + assignment, mask=inside, other=0.0).to(tl.float32)[:, None]
    token, wide = assignment // K, r.to(tl.int64)[:, None]
    total = tl.zeros([ROWS, B], tl.float32)
    for start in range(0, D, B):
        columns = start + tl.arange(0, B)
        mask = inside[:, None] & (columns < D)[None, :]
        g = tl.load(dy + token[:, None] * stride_dy + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        total += g * tl.load(rows + wide * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(drows + wide * D + columns[None, :], (weight * g).to(drows.dtype.element_ty), mask=mask)
    tl.store(dweights + assignment, tl.sum(total, 1).to(dweights.dtype.element_ty), mask=inside)
