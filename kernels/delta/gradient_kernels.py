"""Triton kernels of the delta rule's gradients, chunk by chunk, from what the walks of `walk_kernels` leave.

With x what tokens write, z its gradient, r = A^T z that of their system's right side, E and R the states that enter a
chunk and the gradient of the one that leaves it, the pairs inside a chunk have, as x solves its system, the gradients

    dP = dy x^T  (s <= t)        dL = -r x^T  (s < t)

and beside them, c the sums of log decays, weights w_ts = e^{c_t - c_s}:

    dv    = beta r                            dbeta = v . r + k e^c . e + sum_s dL w (k_t . k_s)      e = -r E^T
    dq    = scale (e^c dy E^T + sum_s dP w k_s)
    dk    = beta e^c e + e^{c_C - c} x R^T + sum_s (beta dL w) k_s + sum over t of (beta dL w) k_t + scale (dP w) q_t

What a decay of token j has a part in are pairs with s < j <= t, what tokens t >= j read of E, what tokens s < j write
into R, and what of E is left at the end. Pairs add to the gradient of c_t what they take from that of c_s, out of one
float32 number: the differences are taken before anything is rounded.

    dg_j = sum over t >= j of (read_t + pairs_t) + sum over s < j of late_s + e^{c_C} <E, R>

x, r: [T, HV, V]; states, dstates: [M, HV, K, V]; pairs [T, HV, C]; G = HV / H; gradients of q and k: [T, HV, K].
"""

# pyright: basic, reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from torchlinearmoe.kernels.delta.solve_kernels import finely, pairs_of, rows_of
from torchlinearmoe.kernels.linear.channel_kernels import (
    BLOCK,
    both_rows,
    factors,
    halves_of,
    middles,
    only,
    readers,
    sums_in,
)
from torchlinearmoe.kernels.linear.walk_kernels import (
    between,
    measured_of,
    state_places,
    sums_of,
)


@triton.jit(do_not_specialize=["T", "H"])
def pair_gradients(
    k, v, beta, decays, inverses, scores, dy, writes, dwrites, rights, dscores, dlower, dv, dbeta, dc, start, end,
    scale, k_t, k_h, v_t, v_h, y_t, y_h, T, H, K, V,
    G: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """r, dv, of dbeta what is in pairs, [T, HV], and what `gradients` multiplies by keys; of DECAY 1 pairs_t to dc.

    dscores: scale dP, dlower: beta dL, with their weights; of DECAY 2, which has them in its sums, scale dP and dL, and
    dbeta lacks what is in pairs. Grid: M, HV; H: HV.
    """
    m, h = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, C)
    token = tl.load(start + m).to(tl.int64)
    tokens = token + place
    inside = tokens < tl.load(end + m)
    if tl.load(start + m) >= tl.load(end + m):
        return
    betas = tl.load(beta + tokens * H + h, mask=inside, other=0.0)
    dpairs = tl.zeros([C, C], dtype=tl.float32)
    dlow = tl.zeros([C, C], dtype=tl.float32)
    dbetas = tl.zeros([C], dtype=tl.float32)
    inverse = pairs_of(inverses, token, inside, h, H, place, C, True)
    for i in range(tl.cdiv(V, BV)):
        columns = i * BV + tl.arange(0, BV)
        xs = rows_of(writes, token, place, inside, H * V, V, h, V, columns)
        dxs = rows_of(dwrites, token, place, inside, H * V, V, h, V, columns)
        rs = finely(inverse, dxs, PRECISION).to(xs.dtype)
        dys = rows_of(dy, token, place, inside, y_t, y_h, h, V, columns)
        dpairs += tl.dot(dys, tl.trans(xs), input_precision=PRECISION)
        dlow -= tl.dot(rs, tl.trans(xs), input_precision=PRECISION)
        vs = rows_of(v, token, place, inside, v_t, v_h, h, V, columns).to(tl.float32)
        dbetas += tl.sum(vs * rs, 1)
        there = inside[:, None] & (columns < V)[None, :]
        places = (token * H + h) * V + (place[:, None] * (H * V) + columns[None, :])
        tl.store(rights + places, rs, mask=there)
        tl.store(dv + places, (rs * betas[:, None]).to(dv.dtype.element_ty), mask=there)
    dpairs = tl.where(place[:, None] >= place[None, :], dpairs, 0.0)
    dlow = tl.where(place[:, None] > place[None, :], dlow, 0.0)
    if DECAY < 2:
        overlaps = tl.zeros([C, C], dtype=tl.float32)
        for i in range(tl.cdiv(K, BK)):
            columns = i * BK + tl.arange(0, BK)
            ks = rows_of(k, token, place, inside, k_t, k_h, h // G, K, columns)
            overlaps += tl.dot(ks, tl.trans(ks), input_precision=PRECISION)
        if DECAY == 1:
            c, resets = sums_of(decays, tokens, inside, h, H, T)
            weights = between(c, resets, C, False)
            dlow *= weights
            both = dpairs * pairs_of(scores, token, inside, h, H, place, C, False)
            dpairs *= weights
        overlaps *= dlow
        dbetas += tl.sum(overlaps, 1)
        dlow *= betas[:, None]
        if DECAY == 1:
            both += overlaps * betas[:, None]
            tl.store(dc + tokens * H + h, tl.sum(both, 1) - tl.sum(both, 0), mask=inside)
    places = (token * H + h) * C + (place[:, None] * (H * C) + place[None, :])
    tl.store(dscores + places, (dpairs * scale).to(dscores.dtype.element_ty), mask=inside[:, None])
    tl.store(dlower + places, dlow.to(dlower.dtype.element_ty), mask=inside[:, None])
    tl.store(dbeta + tokens * H + h, dbetas, mask=inside)


@triton.jit(do_not_specialize=["H", "T", "M"])
def gradients(
    q, k, beta, decays, totals, dscores, dlower, dy, writes, rights, states, dstates, dq, dk, dbeta, read, late, left,
    start, end, scale, q_t, q_h, k_t, k_h, y_t, y_h, H, K, V, T, M,
    G: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, and by tiles of K what is missing of dbeta, read_t and late_s, [tiles, T, HV], and e^{c_C} <E, R>,
    [tiles, M, HV]: of DECAY 0 and 1. Grid: tiles of K, M, HV; H: HV."""
    tile, m, h = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    columns = tile * BK + tl.arange(0, BK)
    place = tl.arange(0, C)
    token = tl.load(start + m).to(tl.int64)
    tokens = token + place
    inside = tokens < tl.load(end + m)
    if tl.load(start + m) >= tl.load(end + m):
        if DECAY == 1:
            tl.store(left + (tile * M + m) * H + h, 0.0)
        return
    reads = tl.zeros([C, BK], dtype=tl.float32)
    erases = tl.zeros([C, BK], dtype=tl.float32)
    leaves = tl.zeros([C, BK], dtype=tl.float32)
    product = 0.0
    for i in range(tl.cdiv(V, BV)):
        columns_v = i * BV + tl.arange(0, BV)
        places, mask = state_places(m, True, h, H, K, V, columns, columns_v, False)
        state = tl.load(states + places, mask=mask, other=0.0)
        dstate = tl.load(dstates + places, mask=mask, other=0.0)
        dys = rows_of(dy, token, place, inside, y_t, y_h, h, V, columns_v)
        reads += tl.dot(dys, tl.trans(state), input_precision=PRECISION)
        rs = rows_of(rights, token, place, inside, H * V, V, h, V, columns_v)
        erases -= tl.dot(rs, tl.trans(state), input_precision=PRECISION)
        xs = rows_of(writes, token, place, inside, H * V, V, h, V, columns_v)
        leaves += tl.dot(xs, tl.trans(dstate), input_precision=PRECISION)
        if DECAY == 1:
            product += tl.sum(tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1), 0)
    reads *= scale
    if DECAY == 1:
        from_start = measured_of(decays, 2, tokens, inside, h, H, T)
        reads *= from_start[:, None]
        erases *= from_start[:, None]
        leaves *= measured_of(decays, 3, tokens, inside, h, H, T)[:, None]
        tl.store(left + (tile * M + m) * H + h, product * tl.load(totals + m * H + h))
    betas = tl.load(beta + tokens * H + h, mask=inside, other=0.0)
    qs = rows_of(q, token, place, inside, q_t, q_h, h // G, K, columns)
    ks = rows_of(k, token, place, inside, k_t, k_h, h // G, K, columns)
    dbetas = tl.sum(erases * ks, 1)
    sums = (tile * T + tokens) * H + h
    tl.store(dbeta + sums, dbetas, mask=inside)
    if DECAY == 1:
        tl.store(read + sums, tl.sum(reads * qs, 1) + betas * dbetas, mask=inside)
        tl.store(late + sums, tl.sum(leaves * ks, 1), mask=inside)
    dpairs = pairs_of(dscores, token, inside, h, H, place, C, False)
    reads += tl.dot(dpairs, ks, input_precision=PRECISION)
    places = (token * H + h) * K + (place[:, None] * (H * K) + columns[None, :])
    mask = inside[:, None] & (columns < K)[None, :]
    tl.store(dq + places, reads.to(dq.dtype.element_ty), mask=mask)
    leaves += erases * betas[:, None]
    dpairs = pairs_of(dscores, token, inside, h, H, place, C, True)
    leaves += tl.dot(dpairs, qs, input_precision=PRECISION)
    dlow = pairs_of(dlower, token, inside, h, H, place, C, False)
    dlow += pairs_of(dlower, token, inside, h, H, place, C, True)
    leaves += tl.dot(dlow, ks, input_precision=PRECISION)
    tl.store(dk + places, leaves.to(dk.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tiles", "H", "T", "M"])
def sum_tiles(
    dbeta, more, dc, read, late, left, dg, start, end, tiles, H, T, M, C: tl.constexpr, DECAY: tl.constexpr
):  # fmt: skip
    """Adds to dbeta what `gradients` made of it by tiles of K; of DECAY 1 dg [T, HV] too. Grid: M, HV; H: HV."""
    m, h = tl.program_id(0), tl.program_id(1)
    tokens = tl.load(start + m).to(tl.int64) + tl.arange(0, C)
    inside = tokens < tl.load(end + m)
    dbetas = tl.load(dbeta + tokens * H + h, mask=inside, other=0.0)
    if DECAY == 1:
        later = tl.load(dc + tokens * H + h, mask=inside, other=0.0)
        before = tl.zeros([C], dtype=tl.float32)
        passing = 0.0
    for i in range(tiles):
        places = (i * T + tokens) * H + h
        dbetas += tl.load(more + places, mask=inside, other=0.0)
        if DECAY == 1:
            later += tl.load(read + places, mask=inside, other=0.0)
            before += tl.load(late + places, mask=inside, other=0.0)
            passing += tl.load(left + (i * M + m) * H + h)
    tl.store(dbeta + tokens * H + h, dbetas, mask=inside)
    if DECAY == 1:
        later = tl.sum(later, 0) - tl.cumsum(later, 0) + later
        tl.store(dg + tokens * H + h, later + tl.cumsum(before, 0) - before + passing, mask=inside)


@triton.jit(do_not_specialize=["H", "T"])
def channel_gradients(
    q, k, beta, c, dscores, dlower, dy, writes, rights, states, dstates, dq, dk, dg, dbeta, start, end,
    scale, q_t, q_h, k_t, k_h, y_t, y_h, H, K, V, T,
    G: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, dg [T, HV, K] and what is missing of dbeta, [tiles, T, HV], of DECAY 2.

    Grid: tiles of K, M, HV; H: HV.

    What reads keys, queries and beta k, and its gradients, dq and of a key that reads, are one matrix of 2 C rows: half
    as many products, twice as large.
    """
    tile, m, h = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    columns = tile * BK + tl.arange(0, BK)
    place = tl.arange(0, C)
    token = tl.load(start + m).to(tl.int64)
    last = tl.load(end + m) - 1 - token
    if last < 0:
        return
    inside = place <= last
    tokens = token + place
    betas = tl.load(beta + tokens * H + h, mask=inside, other=0.0)
    row = tl.arange(0, 2 * C)
    first, reader = row < C, row % C
    present = reader <= last
    betas_r = tl.load(beta + (token + reader) * H + h, mask=present & (row >= C), other=1.0)
    signs = tl.where(first, scale, -1.0)
    pairs = both_rows(
        dscores, dlower, H * C, H * C, (token * H + h) * C, (token * H + h) * C, first, reader, present, C, place
    ).to(OPERAND)
    stride = H * K
    c += token * stride + h * K
    reads = both_rows(
        q, k, q_t, k_t, token * q_t + h // G * q_h, token * k_t + h // G * k_h, first, reader, present, K, columns
    )
    ks = rows_of(k, token, place, inside, k_t, k_h, h // G, K, columns)
    since = sums_in(c, reader, last, stride, columns, K)
    sums = sums_in(c, place, last, stride, columns, K)
    total = tl.load(c + last * stride + columns, mask=columns < K, other=0.0)
    found = tl.zeros([2 * C, BK], dtype=tl.float32)
    leaves = tl.zeros([C, BK], dtype=tl.float32)
    passing = tl.zeros([BK], dtype=tl.float32)
    for i in range(tl.cdiv(V, BV)):
        columns_v = i * BV + tl.arange(0, BV)
        places, mask = state_places(m, True, h, H, K, V, columns, columns_v, False)
        state = tl.load(states + places, mask=mask, other=0.0)
        dstate = tl.load(dstates + places, mask=mask, other=0.0)
        ys = both_rows(
            dy, rights, y_t, H * V, token * y_t + h * y_h, (token * H + h) * V, first, reader, present, V, columns_v
        )
        xs = rows_of(writes, token, place, inside, H * V, V, h, V, columns_v)
        found += tl.dot(ys, tl.trans(state), input_precision=PRECISION)
        leaves += tl.dot(xs, tl.trans(dstate), input_precision=PRECISION)
        passing += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
    found *= tl.exp2(since) * signs[:, None]
    leaves *= tl.exp2(total[None, :] - sums)
    read = tl.zeros([C, BK], dtype=tl.float32)
    for level in range(4):
        size = C >> level
        halves_r, halves = reader * 0 + size > BLOCK, place * 0 + size > BLOCK
        near = only(readers(reader, place, size, halves_r, halves), pairs)
        until = factors(sums_in(c, middles(place, size), last, stride, columns, K) - sums, halves)
        weights = factors(since - sums_in(c, middles(reader, size), last, stride, columns, K), halves_r)
        found += weights * tl.dot(near, (ks * until).to(OPERAND), input_precision=PRECISION)
        weights *= betas_r[:, None]
        read += until * tl.dot(tl.trans(near), (reads * weights).to(OPERAND), input_precision=PRECISION)
    dqs, dks = halves_of(found, C, BK)
    tl.store(dbeta + (tile * T + tokens) * H + h, tl.sum(ks * dks, 1), mask=inside)
    dks *= betas[:, None]
    places = (token * H + h) * K + (place[:, None] * stride + columns[None, :])
    mask = inside[:, None] & (columns < K)[None, :]
    tl.store(dq + places, dqs.to(dq.dtype.element_ty), mask=mask)
    tl.store(dk + places, (leaves + read + dks).to(dk.dtype.element_ty), mask=mask)
    qs = rows_of(q, token, place, inside, q_t, q_h, h // G, K, columns)
    late = leaves * ks
    own = qs * dqs + ks * (dks - read)
    passing = passing * tl.exp2(total) + tl.sum(own, 0)
    own -= late
    tl.store(dg + places, passing[None, :] - tl.cumsum(own, 0) + own, mask=mask)
