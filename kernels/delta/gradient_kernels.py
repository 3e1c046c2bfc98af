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
    MIDDLE,
    block_pairs,
    half_pairs,
    half_weights,
    only,
    sums_at,
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
    """r, dv, of dbeta and of the gradient of c what is in pairs, [T, HV], and what `gradients` multiplies by keys.

    dscores: scale dP, dlower: beta dL, with their weights; of DECAY 2, which has them in its sums, scale dP and dL, and
    dbeta and dc lack what is in pairs. Grid: M, HV; H: HV.
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
def decay_gradients(dc, read, late, left, dg, start, end, tiles, H, T, M, C: tl.constexpr):
    """dg [T, HV] of DECAY 1. Grid: M, HV; H: HV."""
    m, h = tl.program_id(0), tl.program_id(1)
    tokens = tl.load(start + m).to(tl.int64) + tl.arange(0, C)
    inside = tokens < tl.load(end + m)
    later = tl.load(dc + tokens * H + h, mask=inside, other=0.0)
    before = tl.zeros([C], dtype=tl.float32)
    passing = 0.0
    for i in range(tiles):
        places = (i * T + tokens) * H + h
        later += tl.load(read + places, mask=inside, other=0.0)
        before += tl.load(late + places, mask=inside, other=0.0)
        passing += tl.load(left + (i * M + m) * H + h)
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
    stride = H * K
    c += h * K
    reads = tl.zeros([C, BK], dtype=tl.float32)
    erases = tl.zeros([C, BK], dtype=tl.float32)
    leaves = tl.zeros([C, BK], dtype=tl.float32)
    passing = tl.zeros([BK], dtype=tl.float32)
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
        passing += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
    betas = tl.load(beta + tokens * H + h, mask=inside, other=0.0)
    qs = rows_of(q, token, place, inside, q_t, q_h, h // G, K, columns).to(tl.float32)
    ks = rows_of(k, token, place, inside, k_t, k_h, h // G, K, columns).to(tl.float32)
    sums = sums_at(c, token, place, last, stride, columns, K)
    total = tl.load(c + (token + last) * stride + columns, mask=columns < K, other=0.0)
    since = tl.exp2(sums)
    reads *= since * scale
    erases *= since
    leaves *= tl.exp2(total[None, :] - sums)
    read = reads * qs + erases * ks * betas[:, None]
    late = leaves * ks
    passing *= tl.exp2(total)
    # Of the pairs: dqs of their queries, dks of keys that read, dread of keys that are read.
    dpairs = pairs_of(dscores, token, inside, h, H, place, C, False).to(OPERAND)
    dlow = pairs_of(dlower, token, inside, h, H, place, C, False).to(OPERAND)
    middle = sums_at(c, token, place // BLOCK * BLOCK + MIDDLE, last, stride, columns, K)
    since, until = tl.exp2(sums - middle), tl.exp2(middle - sums)
    seen = block_pairs(place, False)
    near, below = only(seen, dpairs), only(seen, dlow)
    weighted = (ks * until).to(OPERAND)
    dqs = since * tl.dot(near, weighted, input_precision=PRECISION)
    dks = since * tl.dot(below, weighted, input_precision=PRECISION)
    part = tl.dot(tl.trans(near), (qs * since).to(OPERAND), input_precision=PRECISION)
    weighted = (ks * since * betas[:, None]).to(OPERAND)
    dread = until * tl.dot(tl.trans(below), weighted, part, input_precision=PRECISION)
    for level in tl.static_range(3):
        weights = half_weights(sums, sums, c, token, place, last, stride, columns, K, 32 >> level)
        seen = half_pairs(place, 32 >> level)
        near, below = only(seen, dpairs), only(seen, dlow)
        weighted = ks * weights
        low = weighted.to(OPERAND)
        dqs += weights * tl.dot(near, low, input_precision=PRECISION)
        dks += weights * tl.dot(below, low, input_precision=PRECISION)
        part = tl.dot(tl.trans(near), (qs * weights).to(OPERAND), input_precision=PRECISION)
        low = (weighted * betas[:, None]).to(OPERAND)
        dread += weights * tl.dot(tl.trans(below), low, part, input_precision=PRECISION)
    read += qs * dqs + ks * (dks * betas[:, None] - dread)
    tl.store(dbeta + (tile * T + tokens) * H + h, tl.sum(ks * (erases + dks), 1), mask=inside)
    places = (token * H + h) * K + (place[:, None] * (H * K) + columns[None, :])
    mask = inside[:, None] & (columns < K)[None, :]
    tl.store(dq + places, (reads + dqs).to(dq.dtype.element_ty), mask=mask)
    tl.store(dk + places, (leaves + dread + (erases + dks) * betas[:, None]).to(dk.dtype.element_ty), mask=mask)
    after = tl.sum(read, 0)[None, :] - tl.cumsum(read, 0) + read
    tl.store(dg + places, after + passing[None, :] + tl.cumsum(late, 0) - late, mask=mask)
