"""Triton kernels of what the tokens of a chunk of DPLR read of each other, and of the state that enters it.

c_t is the sum of a chunk's log decays up to and including t, per channel, and c'_t the sum before t. Scores are

    qb_ts = scale * sum_i q_ti e^{c_ti - c_si} b_si    for s <= t
    ab_ts = sum_i a_ti e^{c'_ti - c_si} b_si           for s < t

and qk, ak with k in place of b; A = (I - ab)^-1. The decays are inside the sums, so pairs are split, LEVELS times: the
later half of a block of tokens reads the earlier one relative to the border between them, where both factors are at
most 1. What is left are blocks of C / 2^LEVELS tokens, relative to one in their middle. Where log decays are bounded by
-L, blocks of B tokens keep factors to e^{L B / 2}: for RWKV7 that is the whole chunk. Without a bound they have 8
tokens, and a log decay below -20 counts as -20, under the rounding of float32.

A is made in float32, of scores whose operands are float32 (TF32), for rounded to 16 bits they are most of the error
where what is removed repeats itself: diagonal blocks of 16 by substitution, and merges

    [ T1        ]                             with T the inverse of the blocks and M what lies between
    [ T2 M T1    T2 ] = T + T M T             two of them, on all of the chunk at once

Tokens of all documents lie one after the other. q, k, a, b, c: [T, H, K]; v: [T, H, V]; what has a row of pairs a token
is [T, H, C], by the place in the chunk; totals: e^{c_C}, [M, H, K].
"""

# pyright: basic, reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from torchlinearmoe.kernels.linear.channel_kernels import factors, middles, only, readers, sums_at
from torchlinearmoe.kernels.linear.walk_kernels import rows_of

SMALL = tl.constexpr(16)


@triton.jit
def sums_before(c, token, place, last, stride, columns, width):
    """[C, B] of c', as `sums_at`."""
    sums = sums_at(c, token, tl.maximum(place - 1, 0), last, stride, columns, width)
    return tl.where(place[:, None] > 0, sums, 0.0)


@triton.jit
def block_pairs(x, place, size, halves):
    """x [t, s] where t and s are in one block of `size` tokens, of halves t in the later and s in the earlier one."""
    return only(readers(place, place, size, halves, halves), x)


@triton.jit
def pairs_of(x, tokens, inside, h, H, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    """[t, s] of x [T, H, C], or [s, t]."""
    place = tl.arange(0, C)
    if TRANSPOSED:
        return tl.load(x + (tokens[None, :] * H + h) * C + place[:, None], mask=inside[None, :], other=0.0)
    return tl.load(x + (tokens[:, None] * H + h) * C + place[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def store_pairs(x, pairs, tokens, inside, h, H, C: tl.constexpr):
    places = (tokens[:, None] * H + h) * C + tl.arange(0, C)[None, :]
    tl.store(x + places, pairs.to(x.dtype.element_ty), mask=inside[:, None])


@triton.jit
def store_rows(x, rows, tokens, inside, h, H, width, columns):
    """Of a contiguous [T, H, width]."""
    places = (tokens[:, None] * H + h) * width + columns[None, :]
    tl.store(x + places, rows.to(x.dtype.element_ty), mask=inside[:, None] & (columns < width)[None, :])


@triton.jit
def finely(x, y, PRECISION: tl.constexpr):
    """x y of a float32 x; of 16 bits y it is the sum of x's upper and lower 16 bits by y."""
    if y.dtype == tl.float32:
        return tl.dot(x, y, input_precision=PRECISION)
    upper = x.to(y.dtype)
    lower = (x - upper.to(tl.float32)).to(y.dtype)
    return tl.dot(lower, y, tl.dot(upper, y))


@triton.jit
def score(
    x, b, k, c, with_b, with_k, start, end, scale, x_t, x_h, b_t, b_h, k_t, k_h, H, K,
    C: tl.constexpr, B: tl.constexpr, LEVELS: tl.constexpr, BEFORE: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """qb and qk of x = q, or with BEFORE ab (float32) and ak of x = a. BLOCK = C / 2^LEVELS. Grid: M, H."""
    m, h = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, C)
    token = tl.load(start + m).to(tl.int64)
    last = tl.load(end + m) - 1 - token
    if last < 0:
        return
    inside = place <= last
    tokens = token + place
    stride = H * K
    c += h * K
    pairs_b = tl.zeros([C, C], dtype=tl.float32)
    pairs_k = tl.zeros([C, C], dtype=tl.float32)
    for i in range(tl.cdiv(K, B)):
        columns = i * B + tl.arange(0, B)
        xs = rows_of(x, tokens, inside, x_t, x_h, h, K, columns).to(tl.float32) * scale
        bs = rows_of(b, tokens, inside, b_t, b_h, h, K, columns).to(tl.float32)
        ks = rows_of(k, tokens, inside, k_t, k_h, h, K, columns).to(tl.float32)
        sums = sums_at(c, token, place, last, stride, columns, K)
        read = sums_before(c, token, place, last, stride, columns, K) if BEFORE else sums
        for level in range(LEVELS + 1):
            size = C >> level
            halves = place * 0 + size > (C >> LEVELS)
            middle = sums_at(c, token, middles(place, size), last, stride, columns, K)
            since, until = (xs * factors(read - middle, halves)).to(OPERAND), factors(middle - sums, halves)
            product = tl.dot(since, tl.trans((bs * until).to(OPERAND)), input_precision=PRECISION)
            pairs_b += block_pairs(product, place, size, halves)
            product = tl.dot(since, tl.trans((ks * until).to(OPERAND)), input_precision=PRECISION)
            pairs_k += block_pairs(product, place, size, halves)
    seen = place[:, None] > place[None, :] if BEFORE else place[:, None] >= place[None, :]
    store_pairs(with_b, only(seen, pairs_b), tokens, inside, h, H, C)
    store_pairs(with_k, only(seen, pairs_k), tokens, inside, h, H, C)


@triton.jit
def invert_blocks(pairs, start, end, H, C: tl.constexpr):
    """The diagonal blocks L of `pairs` [T, H, C] become (I - L)^-1. Grid: M, H."""
    m, h = tl.program_id(0), tl.program_id(1)
    token = tl.load(start + m).to(tl.int64)
    last = tl.load(end + m) - 1 - token
    if last < 0:
        return
    block, small = tl.arange(0, C // SMALL)[:, None, None], tl.arange(0, SMALL)
    row, column = small[None, :, None], small[None, None, :]
    place = block * SMALL + row
    places = ((token + place) * H + h) * C + block * SMALL + column
    lower = tl.load(pairs + places, mask=place + column * 0 <= last, other=0.0)
    inverse = tl.where(row == column, 1.0, tl.zeros_like(lower))
    for i in range(1, SMALL):
        weights = tl.sum(tl.where(row == i, lower, 0.0), 1)
        earlier = tl.sum(weights[:, :, None] * inverse, 1)
        inverse = tl.where(row == i, inverse + earlier[:, None, :], inverse)
    tl.store(pairs + places, inverse, mask=place + column * 0 <= last)


@triton.jit
def merge_blocks(pairs, start, end, H, C: tl.constexpr):
    """What `invert_blocks` left becomes the inverse of the whole chunk. Grid: M, H."""
    m, h = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, C)
    tokens = tl.load(start + m).to(tl.int64) + place
    inside = tokens < tl.load(end + m)
    if tl.load(start + m) >= tl.load(end + m):
        return
    lower = pairs_of(pairs, tokens, inside, h, H, C, False)
    t, s = place[:, None], place[None, :]
    found = only(t // SMALL == s // SMALL, lower)
    part = only((t // SMALL > s // SMALL) & (t // (2 * SMALL) == s // (2 * SMALL)), lower)
    found += tl.dot(found, tl.dot(part, found, input_precision="tf32x3"), input_precision="tf32x3")
    part = only(t // (2 * SMALL) > s // (2 * SMALL), lower)
    found += tl.dot(found, tl.dot(part, found, input_precision="tf32x3"), input_precision="tf32x3")
    store_pairs(pairs, found, tokens, inside, h, H, C)


@triton.jit
def spread(
    q, k, a, b, c, inverse, ak, qb, q_in, k_out, a_in, b_out, solved_a, solved_ak, solved_b, solved_qb, totals,
    start, end, scale, q_t, q_h, k_t, k_h, a_t, a_h, b_t, b_h, H, K,
    C: tl.constexpr, B: tl.constexpr, BACK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the walks take: scale q e^c, k e^{c_C - c}, b e^{c_C - c}, e^{c_C}, and A a e^{c'} and A ak.

    With BACK also a e^{c'}, A^T b e^{c_C - c} and A^T qb^T. Grid: M, H.
    """
    m, h = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, C)
    token = tl.load(start + m).to(tl.int64)
    last = tl.load(end + m) - 1 - token
    if last < 0:
        return
    inside = place <= last
    tokens = token + place
    stride = H * K
    c += h * K
    A = pairs_of(inverse, tokens, inside, h, H, C, False)
    found = finely(A, pairs_of(ak, tokens, inside, h, H, C, False), PRECISION)
    store_pairs(solved_ak, found, tokens, inside, h, H, C)
    for i in range(tl.cdiv(K, B)):
        columns = i * B + tl.arange(0, B)
        sums = sums_at(c, token, place, last, stride, columns, K)
        before = sums_before(c, token, place, last, stride, columns, K)
        total = tl.load(c + (token + last) * stride + columns, mask=columns < K, other=0.0)
        until = tl.exp2(total[None, :] - sums)
        rows = rows_of(q, tokens, inside, q_t, q_h, h, K, columns).to(tl.float32) * (tl.exp2(sums) * scale)
        store_rows(q_in, rows, tokens, inside, h, H, K, columns)
        rows = rows_of(k, tokens, inside, k_t, k_h, h, K, columns).to(tl.float32) * until
        store_rows(k_out, rows, tokens, inside, h, H, K, columns)
        rows = rows_of(b, tokens, inside, b_t, b_h, h, K, columns).to(tl.float32) * until
        store_rows(b_out, rows, tokens, inside, h, H, K, columns)
        rows = rows_of(a, tokens, inside, a_t, a_h, h, K, columns).to(tl.float32) * tl.exp2(before)
        rows = rows.to(a.dtype.element_ty)
        if BACK:
            store_rows(a_in, rows, tokens, inside, h, H, K, columns)
        store_rows(solved_a, finely(A, rows, PRECISION), tokens, inside, h, H, K, columns)
        tl.store(totals + (m.to(tl.int64) * H + h) * K + columns, tl.exp2(total), mask=columns < K)
    if BACK:
        A = pairs_of(inverse, tokens, inside, h, H, C, True)
        found = finely(A, pairs_of(qb, tokens, inside, h, H, C, True), PRECISION)
        store_pairs(solved_qb, found, tokens, inside, h, H, C)
        for i in range(tl.cdiv(K, B)):
            columns = i * B + tl.arange(0, B)
            sums = sums_at(c, token, place, last, stride, columns, K)
            total = tl.load(c + (token + last) * stride + columns, mask=columns < K, other=0.0)
            rows = rows_of(b, tokens, inside, b_t, b_h, h, K, columns).to(tl.float32)
            rows = (rows * tl.exp2(total[None, :] - sums)).to(b.dtype.element_ty)
            store_rows(solved_b, finely(A, rows, PRECISION), tokens, inside, h, H, K, columns)


@triton.jit
def output(
    x, states, near_u, u, near_z, z, y, start, end, u_t, u_h, H, K, V,
    C: tl.constexpr, B: tl.constexpr, BV: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = x S + near_u u + near_z z, [T, H, V], of the states of chunks S [M, H, K, V]; the pairs of near_u and near_z
    as they are or TRANSPOSED. Grid: tiles of V, M, H."""
    columns = tl.program_id(0) * BV + tl.arange(0, BV)
    m, h = tl.program_id(1), tl.program_id(2)
    tokens = tl.load(start + m).to(tl.int64) + tl.arange(0, C)
    inside = tokens < tl.load(end + m)
    if tl.load(start + m) >= tl.load(end + m):
        return
    us = rows_of(u, tokens, inside, u_t, u_h, h, V, columns)
    found = tl.dot(pairs_of(near_u, tokens, inside, h, H, C, TRANSPOSED), us, input_precision=PRECISION)
    zs = rows_of(z, tokens, inside, H * V, V, h, V, columns)
    found = tl.dot(pairs_of(near_z, tokens, inside, h, H, C, TRANSPOSED), zs, found, input_precision=PRECISION)
    states += (m.to(tl.int64) * H + h) * K * V
    for i in range(tl.cdiv(K, B)):
        rows = i * B + tl.arange(0, B)
        xs = rows_of(x, tokens, inside, H * K, K, h, K, rows)
        mask = (rows < K)[:, None] & (columns < V)[None, :]
        state = tl.load(states + rows[:, None] * V + columns[None, :], mask=mask, other=0.0)
        found = tl.dot(xs, state, found, input_precision=PRECISION)
    store_rows(y, found, tokens, inside, h, H, V, columns)
