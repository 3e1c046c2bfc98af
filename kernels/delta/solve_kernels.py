"""Triton kernels of what tokens of one chunk read of each other: scores, and the inverse of the delta rule's system.

With the state E that enters a chunk and c_t the sum of its log decays up to and including t, what token t writes is

    x_t = beta_t (v_t - e^{c_t} E^T k_t) - sum over s < t of L_ts x_s        L_ts = beta_t e^{c_t - c_s} k_t . k_s

so x = A beta (v - (k e^c) E) with A = (I + L)^-1, which knows nothing of states: all chunks are inverted at once, and
the walk that follows multiplies. A is made in float32, L too, for rounded to 16 bits they are most of the error where
keys are alike and beta nears 2: diagonal blocks of 16 row by row, and two merges,

    [ T1        ]                               with T the inverse of the blocks and M what lies between
    [ -T2 M T1   T2 ] = T - T M T               two of them, on all of the chunk at once

Beside them scores P_ts = scale * e^{c_t - c_s} q_t . k_s, s <= t. With a decay per channel the decays are inside the
sums over channels and pairs are split by halving, as `linear/channel_kernels.py` says.

q, k: [T, H, K]; L and A (float32), P: [T, HV, C], by the place in the chunk; G = HV / H; beta: [T, HV].
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
from torchlinearmoe.kernels.linear.walk_kernels import between, log_decays, rows_of

SMALL = tl.constexpr(16)


@triton.jit
def invert(lower, start, end, H, C: tl.constexpr):
    """L becomes A, in place. Grid: M, HV; H: HV.

    In a kernel of its own, and with the blocks handed on through memory, because the products of three parts need all
    registers.
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
    place = tl.arange(0, C)
    t, s = place[:, None], place[None, :]
    places = t * (H * C) + s
    system = tl.load(lower + places, mask=t <= last, other=0.0)
    found = tl.where(t // SMALL == s // SMALL, system, 0.0)
    part = tl.where((t // SMALL > s // SMALL) & (t // (2 * SMALL) == s // (2 * SMALL)), system, 0.0)
    found -= tl.dot(found, tl.dot(part, found, input_precision="tf32x3"), input_precision="tf32x3")
    part = tl.where(t // (2 * SMALL) > s // (2 * SMALL), system, 0.0)
    found -= tl.dot(found, tl.dot(part, found, input_precision="tf32x3"), input_precision="tf32x3")
    tl.store(lower + places, found, mask=t <= last)


@triton.jit
def store_pairs(x, pairs, token, last, h, H, place, C: tl.constexpr):
    """Into x [T, HV, C]; by numbers of 32 bits, for 64 take half of the registers."""
    x += (token * H + h) * C
    tl.store(
        x + (place * (H * C))[:, None] + place[None, :], pairs.to(x.dtype.element_ty), mask=(place <= last)[:, None]
    )


@triton.jit
def prepare(
    q, k, beta, g, systems, scores, start, end, scale, q_t, q_h, k_t, k_h, H, K,
    G: tl.constexpr, C: tl.constexpr, B: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """L and P without a decay, or with one per token and head, g [T, HV]. Grid: M, HV; H: HV."""
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
        ks = rows_of(k, tokens, inside, k_t, k_h, h // G, K, columns)
        qs = rows_of(q, tokens, inside, q_t, q_h, h // G, K, columns)
        pairs += tl.dot(qs, tl.trans(ks), input_precision=PRECISION)
        overlaps += tl.dot(ks, tl.trans(ks), input_precision=PRECISION)
    if DECAY == 1:
        c, resets, _, _ = log_decays(g, tokens, inside, h, H)
        weights = between(c, resets, C, False)
        pairs *= weights
        overlaps *= weights
    betas = tl.load(beta + tokens * H + h, mask=inside, other=0.0)
    lower = tl.where(place[:, None] > place[None, :], overlaps * betas[:, None], 0.0)
    pairs = tl.where(place[:, None] >= place[None, :], pairs * scale, 0.0)
    store_pairs(scores, pairs, token, last, h, H, place, C)
    store_pairs(systems, lower, token, last, h, H, place, C)


@triton.jit
def prepare_channels(
    q, k, beta, c, systems, scores, queries, keys_in, keys_out, totals, start, end, scale, q_t, q_h, k_t, k_h, H, K,
    G: tl.constexpr, C: tl.constexpr, B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """L and P with a decay per channel, whose sums are c [T, HV, K], and scale q e^c, k e^c, k e^{c_C - c}, e^{c_C}.

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
        qs = rows_of(q, tokens, inside, q_t, q_h, h // G, K, columns).to(tl.float32)
        ks = rows_of(k, tokens, inside, k_t, k_h, h // G, K, columns).to(tl.float32)
        sums = sums_at(c, token, place, last, stride, columns, K)
        total = tl.load(c + (token + last) * stride + columns, mask=columns < K, other=0.0)
        places = (tokens[:, None] * H + h) * K + columns[None, :]
        mask = inside[:, None] & (columns < K)[None, :]
        since = tl.exp2(sums)
        tl.store(queries + places, (qs * (since * scale)).to(queries.dtype.element_ty), mask=mask)
        tl.store(keys_in + places, (ks * since).to(keys_in.dtype.element_ty), mask=mask)
        tl.store(keys_out + places, (ks * tl.exp2(total[None, :] - sums)).to(keys_out.dtype.element_ty), mask=mask)
        tl.store(totals + (m.to(tl.int64) * H + h) * K + columns, tl.exp2(total), mask=columns < K)
        for level in tl.static_range(3):
            weights = half_weights(sums, sums, c, token, place, last, stride, columns, K, 32 >> level)
            seen = half_pairs(place, 32 >> level)
            weighted = ks * weights
            pairs += only(seen, tl.dot(qs * weights, tl.trans(weighted), input_precision=PRECISION))
            overlaps += only(seen, tl.dot(weighted, tl.trans(weighted), input_precision=PRECISION))
        middle = sums_at(c, token, place // BLOCK * BLOCK + MIDDLE, last, stride, columns, K)
        seen = block_pairs(place, False)
        since, weighted = tl.exp2(sums - middle), ks * tl.exp2(middle - sums)
        pairs += only(seen, tl.dot(qs * since, tl.trans(weighted), input_precision=PRECISION))
        overlaps += only(seen, tl.dot(ks * since, tl.trans(weighted), input_precision=PRECISION))
    betas = tl.load(beta + tokens * H + h, mask=inside, other=0.0)
    lower = tl.where(place[:, None] > place[None, :], overlaps * betas[:, None], 0.0)
    store_pairs(scores, pairs * scale, token, last, h, H, place, C)
    store_pairs(systems, lower, token, last, h, H, place, C)
