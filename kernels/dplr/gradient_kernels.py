"""Triton kernels of the gradients of DPLR, chunk by chunk and all at once (`rule.py` has the algebra).

c, c' and LEVELS as in `chunk_kernels`. E and R: the states that enter chunks and the gradients of those that leave,
[M, H, K, V]; x and r: what tokens read along a, and its gradient, [T, H, V].
"""

# pyright: basic, reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from torchlinearmoe.kernels.dplr.chunk_kernels import (
    block_pairs,
    factors,
    middles,
    pairs_of,
    store_pairs,
    store_rows,
    sums_before,
)
from torchlinearmoe.kernels.linear.channel_kernels import only, sums_at
from torchlinearmoe.kernels.linear.walk_kernels import rows_of


@triton.jit
def pair_gradients(
    y, x, v, with_b, with_k, start, end, y_t, y_h, v_t, v_h, H, V,
    C: tl.constexpr, BV: tl.constexpr, BEFORE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y x^T and y v^T: of qb and qk where y = do, with BEFORE of ab and ak where y = r. Grid: M, H."""
    m, h = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, C)
    tokens = tl.load(start + m).to(tl.int64) + place
    inside = tokens < tl.load(end + m)
    if tl.load(start + m) >= tl.load(end + m):
        return
    pairs_b = tl.zeros([C, C], dtype=tl.float32)
    pairs_k = tl.zeros([C, C], dtype=tl.float32)
    for j in range(tl.cdiv(V, BV)):
        columns = j * BV + tl.arange(0, BV)
        ys = rows_of(y, tokens, inside, y_t, y_h, h, V, columns)
        xs = rows_of(x, tokens, inside, H * V, V, h, V, columns)
        pairs_b = tl.dot(ys, tl.trans(xs), pairs_b, input_precision=PRECISION)
        vs = rows_of(v, tokens, inside, v_t, v_h, h, V, columns)
        pairs_k = tl.dot(ys, tl.trans(vs), pairs_k, input_precision=PRECISION)
    seen = place[:, None] > place[None, :] if BEFORE else place[:, None] >= place[None, :]
    store_pairs(with_b, only(seen, pairs_b), tokens, inside, h, H, C)
    store_pairs(with_k, only(seen, pairs_k), tokens, inside, h, H, C)


@triton.jit
def _pairs(x, tokens, inside, h, H, place, size, halves, C: tl.constexpr, OPERAND: tl.constexpr):
    return block_pairs(pairs_of(x, tokens, inside, h, H, C, False), place, size, halves).to(OPERAND)


@triton.jit
def channel_gradients(
    q, k, a, b, c, v, x, do, r, entered, left, dqb, dqk, dab, dak, dq, dk, da, db, dg, start, end, scale,
    q_t, q_h, k_t, k_h, a_t, a_h, b_t, b_h, v_t, v_h, do_t, do_h, H, K, V,
    C: tl.constexpr, B: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr, WANT_DG: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, da, db and dg, if that is wanted, [T, H, K]; entered, left: E and R. Grid: tiles of K, M, H."""
    columns = tl.program_id(0) * B + tl.arange(0, B)
    m, h = tl.program_id(1), tl.program_id(2)
    place = tl.arange(0, C)
    token = tl.load(start + m).to(tl.int64)
    last = tl.load(end + m) - 1 - token
    if last < 0:
        return
    inside = place <= last
    tokens = token + place
    dqs = tl.zeros([C, B], dtype=tl.float32)
    das = tl.zeros([C, B], dtype=tl.float32)
    dks = tl.zeros([C, B], dtype=tl.float32)
    dbs = tl.zeros([C, B], dtype=tl.float32)
    passing = tl.zeros([B], dtype=tl.float32)
    start_of_state = (m.to(tl.int64) * H + h) * K * V
    for j in range(tl.cdiv(V, BV)):
        there = j * BV + tl.arange(0, BV)
        places = start_of_state + columns[None, :] * V + there[:, None]
        mask = (columns < K)[None, :] & (there < V)[:, None]
        state = tl.load(entered + places, mask=mask, other=0.0)
        ys = rows_of(do, tokens, inside, do_t, do_h, h, V, there)
        dqs = tl.dot(ys, state, dqs, input_precision=PRECISION)
        ys = rows_of(r, tokens, inside, H * V, V, h, V, there)
        das = tl.dot(ys, state, das, input_precision=PRECISION)
        dstate = tl.load(left + places, mask=mask, other=0.0)
        ys = rows_of(v, tokens, inside, v_t, v_h, h, V, there)
        dks = tl.dot(ys, dstate, dks, input_precision=PRECISION)
        ys = rows_of(x, tokens, inside, H * V, V, h, V, there)
        dbs = tl.dot(ys, dstate, dbs, input_precision=PRECISION)
        passing += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 0)
    stride = H * K
    c += h * K
    qs = rows_of(q, tokens, inside, q_t, q_h, h, K, columns).to(tl.float32)
    ks = rows_of(k, tokens, inside, k_t, k_h, h, K, columns).to(tl.float32)
    a_s = rows_of(a, tokens, inside, a_t, a_h, h, K, columns).to(tl.float32)
    bs = rows_of(b, tokens, inside, b_t, b_h, h, K, columns).to(tl.float32)
    sums = sums_at(c, token, place, last, stride, columns, K)
    before = sums_before(c, token, place, last, stride, columns, K)
    total = tl.load(c + (token + last) * stride + columns, mask=columns < K, other=0.0)
    dqs *= tl.exp2(sums)
    das *= tl.exp2(before)
    until = tl.exp2(total[None, :] - sums)
    dks *= until
    dbs *= until
    passing = passing * tl.exp2(total) + tl.sum(ks * dks + bs * dbs, 0)
    qs *= scale
    for level in range(LEVELS + 1):
        size = C >> level
        halves = place * 0 + size > (C >> LEVELS)
        middle = sums_at(c, token, middles(place, size), last, stride, columns, K)
        since, since_a = factors(sums - middle, halves), factors(before - middle, halves)
        until = factors(middle - sums, halves)
        pairs = _pairs(dqk, tokens, inside, h, H, place, size, halves, C, OPERAND)
        found = tl.dot(pairs, (ks * until).to(OPERAND), input_precision=PRECISION)
        from_q = tl.dot(tl.trans(pairs), (qs * since).to(OPERAND), input_precision=PRECISION)
        pairs = _pairs(dqb, tokens, inside, h, H, place, size, halves, C, OPERAND)
        dqs += since * tl.dot(pairs, (bs * until).to(OPERAND), found, input_precision=PRECISION)
        found = tl.dot(tl.trans(pairs), (qs * since).to(OPERAND), input_precision=PRECISION)
        pairs = _pairs(dab, tokens, inside, h, H, place, size, halves, C, OPERAND)
        dbs += until * tl.dot(tl.trans(pairs), (a_s * since_a).to(OPERAND), found, input_precision=PRECISION)
        found = tl.dot(pairs, (bs * until).to(OPERAND), input_precision=PRECISION)
        pairs = _pairs(dak, tokens, inside, h, H, place, size, halves, C, OPERAND)
        das += since_a * tl.dot(pairs, (ks * until).to(OPERAND), found, input_precision=PRECISION)
        dks += until * tl.dot(tl.trans(pairs), (a_s * since_a).to(OPERAND), from_q, input_precision=PRECISION)
    if WANT_DG:
        change = qs * dqs - ks * dks - bs * dbs
        later = a_s * das  # a reads before its own token's decay
        own = change + later
        after = tl.sum(own, 0)[None, :] - tl.cumsum(own, 0) + change + passing[None, :]
        store_rows(dg, after, tokens, inside, h, H, K, columns)
    store_rows(dq, dqs * scale, tokens, inside, h, H, K, columns)
    store_rows(dk, dks, tokens, inside, h, H, K, columns)
    store_rows(da, das, tokens, inside, h, H, K, columns)
    store_rows(db, dbs, tokens, inside, h, H, K, columns)
