"""Triton kernels of what a decay per channel adds to the walk: scores inside chunks, and the gradients of decays.

With c_t the sum of a chunk's log decays up to and including t, per channel, and c' = c (for RWKV6's bonus: without t):

    A_ts = scale * sum_k q_tk e^{c'_tk - c_sk} k_sk     for s <= t (with a bonus s < t, and A_tt = scale * q_t . u k_t)
    o    = (scale q e^{c'}) S + A v                     S' = e^{c_C} S + (k e^{c_C - c})^T v

The decays cannot leave the sum, so pairs are split by halving: at each level the later half of a block of tokens reads
the earlier half, both relative to the border between them, where both factors are at most 1. What is left are pairs in
blocks of 8 tokens, relative to one in their middle. A log decay below -20 counts as -20, under the rounding of float32:
so no exponent of theirs goes beyond 80.

Backward, dA = scale * do v^T: dq_t = scale e^{c'_t} (do_t S^T) + sum_s dA_ts e^{c'_t - c_s} k_s by the same levels, dk
likewise, and

    dg_j = sum over t >= j of q_t dq_t - k_t dk_t in the chunk + the sum over V of S' and its gradient.

The c are stored once and read at every border: no program sums them again.

Tokens of all documents lie one after the other: q, k, c: [T, H, K]; v: [T, H, V]; scores: [T, H, C], by the place in
the chunk; totals: e^{c_C}, [M, H, K].
"""

# pyright: basic, reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from torchlinearmoe.kernels.linear.walk_kernels import rows_of, state_of

LEAST = tl.constexpr(-20.0)
LOG2E = tl.constexpr(1.4426950408889634)
BLOCK = tl.constexpr(8)
MIDDLE = tl.constexpr(3)


@triton.jit
def cumulate(g, c, start, end, D, C: tl.constexpr, B: tl.constexpr):
    """Sums c of a chunk's log decays up to each token, in base 2 and bounded; g, c: [T, D]. Grid: tiles of D, M."""
    columns = tl.program_id(0) * B + tl.arange(0, B)
    m = tl.program_id(1)
    tokens = tl.load(start + m).to(tl.int64) + tl.arange(0, C)
    inside = tokens < tl.load(end + m)
    places = tokens[:, None] * D + columns[None, :]
    mask = inside[:, None] & (columns < D)[None, :]
    decays = tl.maximum(tl.load(g + places, mask=mask, other=0.0), LEAST) * LOG2E
    tl.store(c + places, tl.cumsum(decays, 0), mask=mask)


@triton.jit
def sums_at(c, token, place, last, stride, columns, width):
    """[C, B] of c [T, H, K] at those places of a chunk, the last one's after it; c: the pointer of the head."""
    places = (token + tl.minimum(place, last))[:, None] * stride + columns[None, :]
    return tl.load(c + places, mask=(columns < width)[None, :], other=0.0)


@triton.jit
def _sums_read(sums, c, token, place, last, stride, columns, width, BONUS: tl.constexpr):
    """c', of which `sums` are c."""
    if BONUS:
        before = sums_at(c, token, tl.maximum(place - 1, 0), last, stride, columns, width)
        return tl.where(place[:, None] > 0, before, 0.0)
    return sums


@triton.jit
def half_weights(sums, read, c, token, place, last, stride, columns, width, HALF: tl.constexpr):
    """Factors of the rows of blocks of 2 HALF tokens, relative to the border of their halves: <= 1."""
    border = sums_at(c, token, place // (2 * HALF) * (2 * HALF) + HALF - 1, last, stride, columns, width)
    later = place % (2 * HALF) >= HALF
    return tl.exp2(tl.where(later[:, None], read - border, border - sums))


@triton.jit
def half_pairs(place, HALF: tl.constexpr):
    """[t, s]: t in the later, s in the earlier half of a block of 2 HALF tokens."""
    block, later = place // (2 * HALF), place % (2 * HALF) >= HALF
    return tl.where(later, block, -1)[:, None] == tl.where(later, -2, block)[None, :]


@triton.jit
def block_pairs(place, BONUS: tl.constexpr):
    """[t, s]: s before t in one block of BLOCK tokens, or t itself."""
    first = (place // BLOCK * BLOCK)[:, None]
    if BONUS:
        return (place[None, :] >= first) & (place[None, :] < place[:, None])
    return (place[None, :] >= first) & (place[None, :] <= place[:, None])


@triton.jit
def both_rows(x, y, stride_x, stride_y, offset_x, offset_y, first, place, inside, width, columns):
    """[2 C, B]: rows of x [T, .., width] where first, else of y; offset: of the chunk's first token."""
    of_x = x + offset_x + (place[:, None] * stride_x + columns[None, :])
    of_y = y + offset_y + (place[:, None] * stride_y + columns[None, :])
    mask = inside[:, None] & (columns < width)[None, :]
    return tl.load(tl.where(first[:, None], of_x, of_y), mask=mask, other=0.0)


@triton.jit
def halves_of(x, C: tl.constexpr, B: tl.constexpr):
    """The upper and the lower half of x [2 C, B]."""
    return tl.split(tl.permute(tl.reshape(x, [2, C, B]), (1, 2, 0)))


@triton.jit
def sums_in(c, place, last, stride, columns, width):
    """`sums_at` of c, the pointer of a chunk's first token and the head, by numbers of 32 bits."""
    places = (tl.minimum(place, last.to(tl.int32)) * stride)[:, None] + columns[None, :]
    return tl.load(c + places, mask=(columns < width)[None, :], other=0.0)


@triton.jit
def middles(place, size):
    """Of each place the last in the earlier half of its block of `size` tokens."""
    return place // size * size + size // 2 - 1


@triton.jit
def factors(exponent, halves):
    """2^exponent [C, B], relative to the middle of a block; where halves [C] of it read each other at most 1."""
    return tl.exp2(tl.minimum(exponent, tl.where(halves, 0.0, 128.0)[:, None]))


@triton.jit
def readers(reader, place, size, halves_r, halves):
    """[t, s]: the token at reader[t] and s in one block of `size` tokens, of halves one in the later, s in the earlier
    one."""
    half_r, half = reader % size >= size // 2, place % size >= size // 2
    reads = tl.where(half_r | ~halves_r, reader // size, -1)
    return reads[:, None] == tl.where(half & halves, -2, place // size)[None, :]


@triton.jit
def only(seen, x):
    return tl.where(seen, x, tl.zeros_like(x))


@triton.jit
def prepare_channels(
    q, k, c, bonus, queries, keys, totals, scores, start, end, scale, q_t, q_h, k_t, k_h, H, K,
    C: tl.constexpr, B: tl.constexpr, BONUS: tl.constexpr, WANT_KEYS: tl.constexpr, WANT_SCORES: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Where they are wanted, k e^{c_C - c} and e^{c_C}, and the scores and scale q e^{c'}. Grid: M, H."""
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
    own = tl.zeros([C], dtype=tl.float32)
    for i in range(tl.cdiv(K, B)):
        columns = i * B + tl.arange(0, B)
        ks = rows_of(k, tokens, inside, k_t, k_h, h, K, columns).to(tl.float32)
        sums = sums_at(c, token, place, last, stride, columns, K)
        places = (tokens[:, None] * H + h) * K + columns[None, :]
        mask = inside[:, None] & (columns < K)[None, :]
        if WANT_KEYS:
            total = tl.load(c + (token + last) * stride + columns, mask=columns < K, other=0.0)
            tl.store(keys + places, (ks * tl.exp2(total[None, :] - sums)).to(keys.dtype.element_ty), mask=mask)
            tl.store(totals + (m.to(tl.int64) * H + h) * K + columns, tl.exp2(total), mask=columns < K)
        if WANT_SCORES:
            qs = rows_of(q, tokens, inside, q_t, q_h, h, K, columns).to(tl.float32)
            read = _sums_read(sums, c, token, place, last, stride, columns, K, BONUS)
            tl.store(queries + places, (qs * (tl.exp2(read) * scale)).to(queries.dtype.element_ty), mask=mask)
            for level in tl.static_range(3):
                weights = half_weights(sums, read, c, token, place, last, stride, columns, K, 32 >> level)
                product = tl.dot(
                    (qs * weights).to(OPERAND), tl.trans((ks * weights).to(OPERAND)), input_precision=PRECISION
                )
                pairs += only(half_pairs(place, 32 >> level), product)
            middle = sums_at(c, token, place // BLOCK * BLOCK + MIDDLE, last, stride, columns, K)
            product = tl.dot(
                (qs * tl.exp2(read - middle)).to(OPERAND),
                tl.trans((ks * tl.exp2(middle - sums)).to(OPERAND)),
                input_precision=PRECISION,
            )
            pairs += only(block_pairs(place, BONUS), product)
            if BONUS:
                extra = tl.load(bonus + h * K + columns, mask=columns < K, other=0.0)
                own += tl.sum(qs * ks * extra[None, :], 1)
    if WANT_SCORES:
        if BONUS:
            pairs += tl.where(place[:, None] == place[None, :], own[:, None], 0.0)
        pairs *= scale
        places = (tokens[:, None] * H + h) * C + place[None, :]
        tl.store(scores + places, pairs.to(scores.dtype.element_ty), mask=inside[:, None])


@triton.jit
def channel_gradients(
    q, k, c, bonus, dpairs, dqueries, dkeys, passing, dq, dk, dg, dbonus, start, end, scale,
    q_t, q_h, k_t, k_h, H, K,
    C: tl.constexpr, B: tl.constexpr, BONUS: tl.constexpr, WANT_DK: tl.constexpr, WANT_DG: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and, where they are wanted, dk, dg and the sums of dbonus over each chunk, [M, H, K]. Grid: tiles of K, M, H.

    dpairs: do v^T inside chunks, [T, H, C]; dqueries, dkeys: of what `prepare_channels` made, without the scores;
    passing: [M, H, K], the sums over V of the state that leaves the chunk and its gradient.
    """
    columns = tl.program_id(0) * B + tl.arange(0, B)
    m, h = tl.program_id(1), tl.program_id(2)
    place = tl.arange(0, C)
    token = tl.load(start + m).to(tl.int64)
    last = tl.load(end + m) - 1 - token
    if last < 0:
        return
    inside = place <= last
    tokens = token + place
    stride = H * K
    c += h * K
    places = (tokens[:, None] * H + h) * C + place[None, :]
    dscores = tl.load(dpairs + places, mask=inside[:, None], other=0.0)
    places = (tokens[:, None] * H + h) * K + columns[None, :]
    mask = inside[:, None] & (columns < K)[None, :]
    qs = rows_of(q, tokens, inside, q_t, q_h, h, K, columns).to(tl.float32)
    ks = rows_of(k, tokens, inside, k_t, k_h, h, K, columns).to(tl.float32)
    sums = sums_at(c, token, place, last, stride, columns, K)
    read = _sums_read(sums, c, token, place, last, stride, columns, K, BONUS)
    middle = sums_at(c, token, place // BLOCK * BLOCK + MIDDLE, last, stride, columns, K)
    since, until = tl.exp2(read - middle), tl.exp2(middle - sums)
    seen = only(block_pairs(place, BONUS), dscores).to(OPERAND)
    dqs = since * tl.dot(seen, (ks * until).to(OPERAND), input_precision=PRECISION)
    if WANT_DK:
        dks = until * tl.dot(tl.trans(seen), (qs * since).to(OPERAND), input_precision=PRECISION)
    for level in tl.static_range(3):
        weights = half_weights(sums, read, c, token, place, last, stride, columns, K, 32 >> level)
        seen = only(half_pairs(place, 32 >> level), dscores).to(OPERAND)
        dqs += weights * tl.dot(seen, (ks * weights).to(OPERAND), input_precision=PRECISION)
        if WANT_DK:
            dks += weights * tl.dot(tl.trans(seen), (qs * weights).to(OPERAND), input_precision=PRECISION)
    dqs += tl.load(dqueries + places, mask=mask, other=0.0).to(tl.float32) * tl.exp2(read)
    dqs *= scale
    if WANT_DK:
        total = tl.load(c + (token + last) * stride + columns, mask=columns < K, other=0.0)
        dks *= scale
        dks += tl.load(dkeys + places, mask=mask, other=0.0).to(tl.float32) * tl.exp2(total[None, :] - sums)
    if WANT_DG:
        later = tl.load(passing + (m.to(tl.int64) * H + h) * K + columns, mask=columns < K, other=0.0)
        writes = ks * dks
        change = qs * dqs - writes
        after = tl.sum(change, 0)[None, :] - tl.cumsum(change, 0)  # of later tokens alone
        after += later[None, :] - writes if BONUS else later[None, :] + change
        tl.store(dg + places, after, mask=mask)
    if BONUS:
        own = scale * tl.sum(tl.where(place[:, None] == place[None, :], dscores.to(tl.float32), 0.0), 1)
        extra = tl.load(bonus + h * K + columns, mask=columns < K, other=0.0)
        tl.store(dbonus + (m.to(tl.int64) * H + h) * K + columns, tl.sum(qs * ks * own[:, None], 0), mask=columns < K)
        dqs += own[:, None] * extra[None, :] * ks
        dks += own[:, None] * extra[None, :] * qs
    tl.store(dq + places, dqs.to(dq.dtype.element_ty), mask=mask)
    if WANT_DK:
        tl.store(dk + places, dks.to(dk.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "S"])
def passing_of_chunks(
    read, written, states, dstates, ended, passing, segment, first, N, S, H, K, V,
    GROUP: tl.constexpr, B: tl.constexpr, BV: tl.constexpr, HAS_STATES: tl.constexpr, HAS_ENDED: tl.constexpr,
):  # fmt: skip
    """The sum over V of state and gradient at the end of each chunk, [M, H, K]. Grid: tiles of K, H, stretches.

    read, written: [M, H, K], sums over a chunk's tokens of what `walk` makes; states, dstates: what enters each stretch
    from either side; ended: [N, H, K], the same sum at the end of each document.
    """
    columns = tl.program_id(0) * B + tl.arange(0, B)
    h, s = tl.program_id(1), tl.program_id(2)
    lowest = s * GROUP
    highest = tl.minimum(lowest + GROUP, tl.load(first + N))
    sums = tl.zeros([B], dtype=tl.float32)
    if HAS_STATES:  # noqa: SIM102 - a constant, not a value of the kernel
        if s + 1 < S:
            for j in range(tl.cdiv(V, BV)):
                columns_v = j * BV + tl.arange(0, BV)
                state = state_of(states, s + 1, h, H, K, V, columns, columns_v, False)
                sums += tl.sum(state * state_of(dstates, s, h, H, K, V, columns, columns_v, False), 1)
    for i in range(highest - lowest):
        m = highest - 1 - i
        n = tl.load(segment + m)
        ends = m + 1 == tl.load(first + n + 1)
        if HAS_ENDED:
            at_end = tl.load(
                ended + (n.to(tl.int64) * H + h) * K + columns, mask=columns < tl.where(ends, K, 0), other=0.0
            )
            sums = tl.where(ends, at_end, sums)
        else:
            sums = tl.where(ends, 0.0, sums)
        places = (m.to(tl.int64) * H + h) * K + columns
        tl.store(passing + places, sums, mask=columns < K)
        sums += tl.load(read + places, mask=columns < K, other=0.0)
        sums -= tl.load(written + places, mask=columns < K, other=0.0)
