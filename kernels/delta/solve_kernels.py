"""Triton kernels of what tokens of one chunk read of each other: scores, and the inverse of the delta rule's system.

With the state E that enters a chunk and c_t the sum of its log decays up to and including t, what token t writes is

    x_t = beta_t (v_t - e^{c_t} E^T k_t) - sum over s < t of L_ts x_s        L_ts = beta_t e^{c_t - c_s} k_t . k_s

so x = U - W E with U = A beta v, W = A beta (k e^c) and A = (I + L)^-1, which know nothing of states: all chunks are
solved at once, and the walk that follows multiplies. A is made in float32, L too, for rounded to 16 bits they are most
of the error where keys are alike and beta nears 2: diagonal blocks of 16 row by row, and two rounds of merges,

    [ T1        ]
    [ -T2 M T1   T2 ]        with T1, T2 the inverses of two blocks and M what lies between

Beside them scores P_ts = scale * e^{c_t - c_s} q_t . k_s, s <= t. With a decay per channel the decays are inside the
sums over channels and pairs are split by halving, as `linear/channel_kernels.py` says.

q, k: [T, H, K]; W: [T, HV, K]; U: [T, HV, V]; L and A (float32), P: [T, HV, C], by the place in the chunk; beta:
[T, HV]; G = HV / H.
"""

# pyright: basic, reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from torchlinearmoe.kernels.linear.channel_kernels import (
    BLOCK,
    MIDDLE,
    block_pairs,
    half_pairs,
    half_weights,
    only,
    sums_at,
)
from torchlinearmoe.kernels.linear.walk_kernels import between, measured_of, sums_of

SMALL = tl.constexpr(16)


@triton.jit
def rows_of(x, token, place, inside, stride_t, stride_h, h, width, columns):
    """[C, B] of x [T, H, width]; places are numbers of 32 bits, for 64 take twice the registers."""
    x += token * stride_t + h * stride_h
    mask = inside[:, None] & (columns < width)[None, :]
    return tl.load(x + (place[:, None] * stride_t + columns[None, :]), mask=mask, other=0.0)


@triton.jit
def pairs_of(x, token, inside, h, H, place, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    """[t, s] of x [T, HV, C], or [s, t]."""
    x += (token * H + h) * C
    if TRANSPOSED:
        return tl.load(x + (place[None, :] * (H * C) + place[:, None]), mask=inside[None, :], other=0.0)
    return tl.load(x + (place[:, None] * (H * C) + place[None, :]), mask=inside[:, None], other=0.0)


@triton.jit
def finely(a, b, PRECISION: tl.constexpr):
    """a b of a float32 a; of 16 bits b it is the sum of a's upper and lower 16 bits by b."""
    if b.dtype == tl.float32:
        return tl.dot(a, b, input_precision=PRECISION)
    upper = a.to(b.dtype)
    lower = (a - upper.to(tl.float32)).to(b.dtype)
    return tl.dot(lower, b, tl.dot(upper, b))


@triton.jit
def _block(x, stride, last, row, column, B: tl.constexpr):
    """Places of B x B of one chunk's pairs, and which are there."""
    place = tl.arange(0, B)
    rows = row + place[:, None]
    return x + rows * stride + column + place[None, :], (rows <= last) & (place[None, :] >= 0)


@triton.jit
def _merge(x, stride, last, corner, B: tl.constexpr, DOUBLE: tl.constexpr):
    """Of 2 B x 2 B at a corner of the diagonal, whose blocks of B are inverted, what lies below them."""
    at, there = _block(x, stride, last, corner + B, corner, B)
    between = tl.load(at, mask=there, other=0.0)
    of, inside = _block(x, stride, last, corner, corner, B)
    first = tl.load(of, mask=inside, other=0.0)
    of, inside = _block(x, stride, last, corner + B, corner + B, B)
    second = tl.load(of, mask=inside, other=0.0)
    if DOUBLE:
        found = tl.dot(second.to(tl.float64), tl.dot(between.to(tl.float64), first.to(tl.float64))).to(tl.float32)
    else:
        found = tl.dot(second, tl.dot(between, first, input_precision="tf32x3"), input_precision="tf32x3")
    tl.store(at, -found, mask=there)


@triton.jit(do_not_specialize=["H"])
def invert(lower, start, end, H, C: tl.constexpr, DOUBLE: tl.constexpr):
    """L becomes A, in place; of float32 inputs its products are made in float64. Grid: M, HV; H: HV.

    One warp a program, so that no warp waits for another; blocks are handed on through memory.
    """
    m, h = tl.program_id(0), tl.program_id(1)
    token = tl.load(start + m).to(tl.int64)
    last = tl.load(end + m) - 1 - token
    if last < 0:
        return
    lower += (token * H + h) * C
    small = tl.arange(0, SMALL)
    row = small[None, :, None]
    corner = tl.arange(0, C // SMALL)[:, None, None] * SMALL
    places = (corner + row) * (H * C) + corner + small[None, None, :]
    inside = (corner + row <= last) & (small[None, None, :] >= 0)
    diagonal = tl.load(lower + places, mask=inside, other=0.0)
    inverse = tl.where(row == small[None, None, :], 1.0, 0.0) + tl.zeros_like(diagonal)
    for i in range(1, SMALL):
        weights = tl.sum(tl.where(row == i, diagonal, 0.0), 1)
        earlier = tl.sum(weights[:, :, None] * inverse, 1)
        inverse = tl.where(row == i, inverse - earlier[:, None, :], inverse)
    tl.store(lower + places, inverse, mask=inside)
    tl.debug_barrier()
    for pair in tl.static_range(C // (2 * SMALL)):
        _merge(lower, H * C, last, 2 * SMALL * pair, SMALL, DOUBLE)
    tl.debug_barrier()
    _merge(lower, H * C, last, 0, 2 * SMALL, DOUBLE)


@triton.jit(do_not_specialize=["T", "H"])
def spread(
    inverses, k, v, beta, decays, erasing, writing, start, end, k_t, k_h, v_t, v_h, T, H, K, V,
    G: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """W = A beta k e^c [T, HV, K] and U = A beta v [T, HV, V]. Grid: M, HV; H: HV.

    k, of DECAY 2 k e^c; the same of G value heads.
    """
    m, h = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, C)
    token = tl.load(start + m).to(tl.int64)
    tokens = token + place
    inside = tokens < tl.load(end + m)
    if tl.load(start + m) >= tl.load(end + m):
        return
    inverse = pairs_of(inverses, token, inside, h, H, place, C, False)
    betas = tl.load(beta + tokens * H + h, mask=inside, other=0.0)
    for i in range(tl.cdiv(V, BV)):
        columns = i * BV + tl.arange(0, BV)
        vs = rows_of(v, token, place, inside, v_t, v_h, h, V, columns)
        found = finely(inverse, (vs * betas[:, None]).to(vs.dtype), PRECISION)
        places = (token * H + h) * V + (place[:, None] * (H * V) + columns[None, :])
        tl.store(writing + places, found.to(writing.dtype.element_ty), mask=inside[:, None] & (columns < V)[None, :])
    if DECAY == 1:
        betas *= measured_of(decays, 2, tokens, inside, h, H, T)
    for i in range(tl.cdiv(K, BK)):
        columns = i * BK + tl.arange(0, BK)
        ks = rows_of(k, token, place, inside, k_t, k_h, h // G, K, columns)
        found = finely(inverse, (ks * betas[:, None]).to(ks.dtype), PRECISION)
        places = (token * H + h) * K + (place[:, None] * (H * K) + columns[None, :])
        tl.store(erasing + places, found.to(erasing.dtype.element_ty), mask=inside[:, None] & (columns < K)[None, :])


@triton.jit
def store_pairs(x, pairs, token, last, h, H, place, C: tl.constexpr):
    """Into x [T, HV, C]; by numbers of 32 bits, for 64 take half of the registers."""
    x += (token * H + h) * C
    tl.store(
        x + (place * (H * C))[:, None] + place[None, :], pairs.to(x.dtype.element_ty), mask=(place <= last)[:, None]
    )


@triton.jit(do_not_specialize=["T", "H"])
def prepare(
    q, k, beta, decays, systems, scores, start, end, scale, q_t, q_h, k_t, k_h, T, H, K,
    G: tl.constexpr, C: tl.constexpr, B: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """L and P without a decay, or with one per token and head, as `measure` makes it. Grid: M, HV; H: HV."""
    m, h = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, C)
    token = tl.load(start + m).to(tl.int64)
    last = tl.load(end + m) - 1 - token
    if last < 0:
        return
    inside = place <= last
    tokens = token + place
    pairs = tl.zeros([C, C], dtype=tl.float32)
    overlaps = tl.zeros([C, C], dtype=tl.float32)
    for i in range(tl.cdiv(K, B)):
        columns = i * B + tl.arange(0, B)
        ks = rows_of(k, token, place, inside, k_t, k_h, h // G, K, columns)
        qs = rows_of(q, token, place, inside, q_t, q_h, h // G, K, columns)
        pairs += tl.dot(qs, tl.trans(ks), input_precision=PRECISION)
        overlaps += tl.dot(ks, tl.trans(ks), input_precision=PRECISION)
    if DECAY == 1:
        c, resets = sums_of(decays, tokens, inside, h, H, T)
        weights = between(c, resets, C, False)
        pairs *= weights
        overlaps *= weights
    betas = tl.load(beta + tokens * H + h, mask=inside, other=0.0)
    lower = tl.where(place[:, None] > place[None, :], overlaps * betas[:, None], 0.0)
    pairs = tl.where(place[:, None] >= place[None, :], pairs * scale, 0.0)
    store_pairs(scores, pairs, token, last, h, H, place, C)
    store_pairs(systems, lower, token, last, h, H, place, C)


@triton.jit(do_not_specialize=["H"])
def prepare_channels(
    q, k, beta, c, systems, scores, queries, keys_in, keys_out, totals, start, end, scale, q_t, q_h, k_t, k_h, H, K,
    G: tl.constexpr, C: tl.constexpr, B: tl.constexpr, WANT_PAIRS: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """scale q e^c, k e^c, k e^{c_C - c}, e^{c_C} of the sums c [T, HV, K] of a decay per channel; L and P, if wanted.

    Grid: M, HV; H: HV.
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
    pairs = tl.zeros([C, C], dtype=tl.float32)
    overlaps = tl.zeros([C, C], dtype=tl.float32)
    for i in range(tl.cdiv(K, B)):
        columns = i * B + tl.arange(0, B)
        qs = rows_of(q, token, place, inside, q_t, q_h, h // G, K, columns).to(tl.float32)
        ks = rows_of(k, token, place, inside, k_t, k_h, h // G, K, columns).to(tl.float32)
        sums = sums_at(c, token, place, last, stride, columns, K)
        total = tl.load(c + (token + last) * stride + columns, mask=columns < K, other=0.0)
        places = (token * H + h) * K + (place[:, None] * (H * K) + columns[None, :])
        mask = inside[:, None] & (columns < K)[None, :]
        since = tl.exp2(sums)
        tl.store(queries + places, (qs * (since * scale)).to(queries.dtype.element_ty), mask=mask)
        tl.store(keys_in + places, (ks * since).to(keys_in.dtype.element_ty), mask=mask)
        tl.store(keys_out + places, (ks * tl.exp2(total[None, :] - sums)).to(keys_out.dtype.element_ty), mask=mask)
        tl.store(totals + (m.to(tl.int64) * H + h) * K + columns, tl.exp2(total), mask=columns < K)
        if WANT_PAIRS:
            for level in tl.static_range(3):
                weights = half_weights(sums, sums, c, token, place, last, stride, columns, K, 32 >> level)
                seen = half_pairs(place, 32 >> level)
                weighted = (ks * weights).to(OPERAND)
                pairs += only(seen, tl.dot((qs * weights).to(OPERAND), tl.trans(weighted), input_precision=PRECISION))
                overlaps += only(seen, tl.dot(weighted, tl.trans(weighted), input_precision=PRECISION))
            middle = sums_at(c, token, place // BLOCK * BLOCK + MIDDLE, last, stride, columns, K)
            seen = block_pairs(place, False)
            since, weighted = tl.exp2(sums - middle), (ks * tl.exp2(middle - sums)).to(OPERAND)
            pairs += only(seen, tl.dot((qs * since).to(OPERAND), tl.trans(weighted), input_precision=PRECISION))
            overlaps += only(seen, tl.dot((ks * since).to(OPERAND), tl.trans(weighted), input_precision=PRECISION))
    if WANT_PAIRS:
        betas = tl.load(beta + tokens * H + h, mask=inside, other=0.0)
        lower = tl.where(place[:, None] > place[None, :], overlaps * betas[:, None], 0.0)
        store_pairs(scores, pairs * scale, token, last, h, H, place, C)
        store_pairs(systems, lower, token, last, h, H, place, C)
