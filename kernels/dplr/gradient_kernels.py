"""Triton kernels of the gradients of DPLR, chunk by chunk and all at once (`rule.py` has the algebra).

c, c' and LEVELS as in `chunk_kernels`. E and R: the states that enter chunks and the gradients of those that leave,
[M, H, K, V]; x and r: what tokens read along a, and its gradient, [T, H, V].
"""

# pyright: basic, reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from torchlinearmoe.kernels.linear.channel_kernels import (
    both_rows,
    factors,
    halves_of,
    middles,
    only,
    readers,
    sums_in,
)


@triton.jit
def pair_gradients(
    do, r, v, x, pairs, start, end, do_t, do_h, v_t, v_h, H, V, C: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """do v^T, do x^T and r v^T, r x^T, of qk, qb and ak, ab: [T, H, 2, 2 C]. Grid: M, H."""
    m, h = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, 2 * C)
    first, place = row < C, row % C
    token = tl.load(start + m).to(tl.int64)
    last = tl.load(end + m) - 1 - token
    if last < 0:
        return
    inside = place <= last
    found = tl.zeros([2 * C, 2 * C], dtype=tl.float32)
    at = (token * H + h) * V
    for j in range(tl.cdiv(V, BV)):
        columns = j * BV + tl.arange(0, BV)
        ys = both_rows(do, r, do_t, H * V, token * do_t + h * do_h, at, first, place, inside, V, columns)
        zs = both_rows(v, x, v_t, H * V, token * v_t + h * v_h, at, first, place, inside, V, columns)
        found = tl.dot(ys, tl.trans(zs), found, input_precision=PRECISION)
    found = only(tl.where(first, place, place - 1)[:, None] >= place[None, :], found)
    pairs += (token * H + h) * (4 * C)
    places = (place * (H * 4 * C) + tl.where(first, 0, 2 * C))[:, None] + row[None, :]
    tl.store(pairs + places, found.to(pairs.dtype.element_ty), mask=inside[:, None])


@triton.jit
def channel_gradients(
    q, k, a, b, c, v, x, do, r, entered, left, pairs, dq, dk, da, db, dg, start, end, scale,
    q_t, q_h, k_t, k_h, a_t, a_h, b_t, b_h, v_t, v_h, do_t, do_h, H, K, V,
    C: tl.constexpr, B: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr, WANT_DG: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, da, db and dg, if that is wanted, [T, H, K]; entered, left: E and R. Grid: tiles of K, M, H.

    pairs: of `pair_gradients`. q and a, which read, are one matrix of 2 C rows, and so are k and b, which are read: two
    large products in place of eight.
    """
    columns = tl.program_id(0) * B + tl.arange(0, B)
    m, h = tl.program_id(1), tl.program_id(2)
    row = tl.arange(0, 2 * C)
    first, place = row < C, row % C
    token = tl.load(start + m).to(tl.int64)
    last = tl.load(end + m) - 1 - token
    if last < 0:
        return
    inside = place <= last
    stride = H * K
    c += token * stride + h * K
    reads = both_rows(q, a, q_t, a_t, token * q_t + h * q_h, token * a_t + h * a_h, first, place, inside, K, columns)
    sources = both_rows(k, b, k_t, b_t, token * k_t + h * k_h, token * b_t + h * b_h, first, place, inside, K, columns)
    sums = sums_in(c, place, last, stride, columns, K)
    until = tl.where(first, place, place - 1)  # a reads before its own token's decay
    since = tl.where((until >= 0)[:, None], sums_in(c, tl.maximum(until, 0), last, stride, columns, K), 0.0)
    total = tl.load(c + last * stride + columns, mask=columns < K, other=0.0)
    found = tl.zeros([2 * C, B], dtype=tl.float32)
    gone = tl.zeros([2 * C, B], dtype=tl.float32)
    passing = tl.zeros([B], dtype=tl.float32)
    start_of_state = (m.to(tl.int64) * H + h) * K * V
    at = (token * H + h) * V
    for j in range(tl.cdiv(V, BV)):
        there = j * BV + tl.arange(0, BV)
        of_state = start_of_state + columns[:, None] * V + there[None, :]
        mask = (columns < K)[:, None] & (there < V)[None, :]
        state = tl.load(entered + of_state, mask=mask, other=0.0)
        dstate = tl.load(left + of_state, mask=mask, other=0.0)
        ys = both_rows(do, r, do_t, H * V, token * do_t + h * do_h, at, first, place, inside, V, there)
        zs = both_rows(v, x, v_t, H * V, token * v_t + h * v_h, at, first, place, inside, V, there)
        found += tl.dot(ys, tl.trans(state), input_precision=PRECISION)
        gone += tl.dot(zs, tl.trans(dstate), input_precision=PRECISION)
        passing += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
    pairs += (token * H + h) * (4 * C)
    places = (place * (H * 4 * C) + tl.where(first, 0, 2 * C))[:, None] + row[None, :]
    given = tl.load(pairs + places, mask=inside[:, None], other=0.0).to(OPERAND)
    found *= tl.exp2(since)
    gone *= tl.exp2(total[None, :] - sums)
    passing = passing * tl.exp2(total) + tl.sum(sources * gone, 0)
    scales = tl.where(first, scale, 1.0)[:, None]
    for level in range(LEVELS + 1):
        size = C >> level
        halves = place * 0 + size > (C >> LEVELS)
        middle = sums_in(c, middles(place, size), last, stride, columns, K)
        near = only(readers(place, place, size, halves, halves), given)
        weights = factors(middle - sums, halves)
        product = tl.dot(near, (sources * weights).to(OPERAND), input_precision=PRECISION)
        weights_r = factors(since - middle, halves)
        found += weights_r * product
        product = tl.dot(tl.trans(near), (reads * (weights_r * scales)).to(OPERAND), input_precision=PRECISION)
        gone += weights * product
    found *= scales
    places = (token * H + h) * K + (place[:, None] * stride + columns[None, :])
    mask = inside[:, None] & (columns < K)[None, :]
    tl.store(tl.where(first[:, None], dq + places, da + places), found.to(dq.dtype.element_ty), mask=mask)
    tl.store(tl.where(first[:, None], dk + places, db + places), gone.to(dk.dtype.element_ty), mask=mask)
    if WANT_DG:
        found *= reads
        _, later = halves_of(found, C, B)
        of_first, of_second = halves_of(found - sources * gone, C, B)
        own = of_first + of_second
        after = tl.sum(own, 0)[None, :] - tl.cumsum(own, 0) + (own - later) + passing[None, :]
        place = tl.arange(0, C)
        places = (token * H + h) * K + (place[:, None] * stride + columns[None, :])
        tl.store(dg + places, after, mask=(place <= last)[:, None] & (columns < K)[None, :])
