"""Triton kernels that walk a linear recurrence chunk by chunk, many stretches of chunks at once.

    y_t = x_t^T S + sum over the chunk's earlier s of D_ts (x_t . w_s) u_s          S' = a S + sum_s w_s u_s^T

with S [X, U] the state that enters the chunk. Output and gradients of o_t = scale * q_t^T S_t are four such walks,
(x, w, u) = (q, k, v) for o, (do, v, k) for dq, and from the last chunk to the first (k, q, do) for dv and (v, do, q)
for dk, whose "state" is the gradient of the state; that of dq and dk is transposed.

A stretch is GROUP chunks of the whole stream, whatever documents they are of. `summarize` walks every stretch from an
empty state, `join` folds the summaries into the state that enters each, and `walk` starts there: a long document fills
the chip, and no state but one a stretch is stored. A stretch in which a document begins passes nothing on.

Decays, by DECAY: 0 none; 1 one per token and head, as `measure` makes them of g [T, H]; 2 one per row of the state, 3
per column, both as factors over a whole chunk, totals [M, H, rows or columns], with x, w and u already scaled. Of DECAY
1 a log decay below -20 counts as a reset: e^-20 is under the rounding of float32. So the sums c, which are subtracted
from each other, stay small, whatever the decays, -inf too.

Matrices that are wanted transposed are loaded or multiplied that way; no product of a product is transposed, which
Triton 3.4 to 3.7.0 miscompiles on Hopper GPUs (https://github.com/fla-org/flash-linear-attention/issues/640).

x, w: [T, H, X] and u: [T, H, U], strides of tokens and heads as given; y: [T, H, U]; states: [stretches, H, K, V].
"""

# pyright: basic, reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false

import triton
import triton.language as tl

RESET = tl.constexpr(-20.0)
NOTHING = tl.constexpr(-1e30)
"""The log decay up to a token that is not there."""


@triton.jit
def log_decays(g, tokens, inside, h, H):
    """Of a chunk: sums c of log decays up to each token, the resets so far, and both at the chunk's end."""
    decays = tl.load(g + tokens * H + h, mask=inside, other=0.0)
    resets = tl.where(decays < RESET, 1.0, 0.0)
    decays = tl.where(decays < RESET, 0.0, decays)
    return tl.cumsum(decays, 0), tl.cumsum(resets, 0), tl.sum(decays, 0), tl.sum(resets, 0)


@triton.jit
def since_start(c, n):
    return tl.where(n == 0.0, tl.exp(c), 0.0)


@triton.jit
def until_end(c, n, total, resets):
    return tl.where(n == resets, tl.exp(total - c), 0.0)


@triton.jit(do_not_specialize=["T", "M"])
def measure(g, measured, totals, start, end, H, T, M, C: tl.constexpr, LEAST: tl.constexpr):
    """What walks read of decays g [T, H]. Grid: M, H.

    measured [6, H, T], by token: 0 sums c of its chunk's log decays up to it, 1 resets so far, 2 the factor since the
    chunk's start, 3 the one until its end, 4 e^{c - c_C / 2}, 5 e^{c_C / 2 - c}; totals [3, M, H]: the factor over the
    chunk, the one over its half, and whether it is plain: no reset, and c_C at least LEAST, so that 4 and 5, of which a
    pair's decay is a product, are in the range of what is multiplied.
    """
    m, h = tl.program_id(0), tl.program_id(1)
    tokens = tl.load(start + m).to(tl.int64) + tl.arange(0, C)
    inside = tokens < tl.load(end + m)
    c, n, total, all_resets = log_decays(g, tokens, inside, h, H)
    plain = (all_resets == 0.0) & (total >= LEAST)
    half = tl.where(plain, total * 0.5, 0.0)
    places = measured + h.to(tl.int64) * T + tokens
    row = T.to(tl.int64) * H
    tl.store(places, c, mask=inside)
    tl.store(places + row, n, mask=inside)
    tl.store(places + 2 * row, since_start(c, n), mask=inside)
    tl.store(places + 3 * row, until_end(c, n, total, all_resets), mask=inside)
    tl.store(places + 4 * row, tl.exp(tl.where(plain, c - half, 0.0)), mask=inside)
    tl.store(places + 5 * row, tl.exp(tl.where(plain, half - c, 0.0)), mask=inside)
    tl.store(totals + m * H + h, since_start(total, all_resets))
    tl.store(totals + (M + m) * H + h, tl.exp(half))
    tl.store(totals + (2 * M + m) * H + h, tl.where(plain, 1.0, 0.0))


@triton.jit
def measured_of(measured, which: tl.constexpr, tokens, inside, h, H, T):
    """[C] of `measure`."""
    return tl.load(measured + (which * H + h).to(tl.int64) * T + tokens, mask=inside, other=0.0)


@triton.jit
def sums_of(measured, tokens, inside, h, H, T):
    """c and the resets so far of `measure`; tokens that are not there are infinitely far off."""
    c = tl.where(inside, measured_of(measured, 0, tokens, inside, h, H, T), NOTHING)
    return c, measured_of(measured, 1, tokens, inside, h, H, T)


@triton.jit
def between(c, n, C: tl.constexpr, REVERSE: tl.constexpr):
    """e^{c_t - c_s} where s <= t, else 0: [t, s], or [s, t]."""
    place = tl.arange(0, C)
    if REVERSE:
        seen = (place[:, None] <= place[None, :]) & (n[:, None] == n[None, :])
        return tl.where(seen, tl.exp(tl.where(seen, c[None, :] - c[:, None], 0.0)), 0.0)
    seen = (place[:, None] >= place[None, :]) & (n[:, None] == n[None, :])
    return tl.where(seen, tl.exp(tl.where(seen, c[:, None] - c[None, :], 0.0)), 0.0)


@triton.jit
def earlier(pairs, place, REVERSE: tl.constexpr):
    """[t, s] where s <= t, or [s, t], else 0."""
    if REVERSE:
        return tl.where(place[:, None] <= place[None, :], pairs, 0.0)
    return tl.where(place[:, None] >= place[None, :], pairs, 0.0)


@triton.jit
def rows_of(x, tokens, inside, stride_t, stride_h, h, width, columns):
    """[C, B] of x [T, H, width]."""
    places = tokens[:, None] * stride_t + h * stride_h + columns[None, :]
    return tl.load(x + places, mask=inside[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def state_places(row, wanted, h, H, X, U, rows, columns, TRANSPOSED: tl.constexpr):
    """Where [rows, columns] of the state at `row` of [.., H, X, U], or [.., H, U, X], lies, and what is there; nothing
    unless it is wanted."""
    start = (row.to(tl.int64) * H + h) * X * U
    mask = (rows < tl.where(wanted, X, 0))[:, None] & (columns < U)[None, :]
    if TRANSPOSED:
        return start + columns[None, :] * X + rows[:, None], mask
    return start + rows[:, None] * U + columns[None, :], mask


@triton.jit
def state_of(states, row, h, H, X, U, rows, columns, TRANSPOSED: tl.constexpr):
    """[rows, columns] of the state at `row`."""
    places, mask = state_places(row, True, h, H, X, U, rows, columns, TRANSPOSED)
    return tl.load(states + places, mask=mask, other=0.0)


@triton.jit
def passed_over(totals, m, h, H, width, places):
    """Factors over a chunk, totals [M, H, width]."""
    return tl.load(totals + (m.to(tl.int64) * H + h) * width + places, mask=places < width, other=0.0)


@triton.jit(do_not_specialize=["N", "T", "M"])
def summarize(
    w, u, decays, totals, enter, states, factors, start, end, segment, first, N, scale,
    w_t, w_h, u_t, u_h, H, X, U, T, M,
    GROUP: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BU: tl.constexpr,
    REVERSE: tl.constexpr, DECAY: tl.constexpr, HAS_ENTER: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The state at each stretch's end, entered empty, and the factor of what enters: [stretches, H, 1 or X].

    Grid: tiles of the state, H, stretches.
    """
    tiles_u = tl.cdiv(U, BU)
    rows = (tl.program_id(0) // tiles_u) * BX + tl.arange(0, BX)
    columns = (tl.program_id(0) % tiles_u) * BU + tl.arange(0, BU)
    h, s = tl.program_id(1), tl.program_id(2)
    lowest = s * GROUP
    highest = tl.minimum(lowest + GROUP, tl.load(first + N))
    state = tl.zeros([BX, BU], dtype=tl.float32)
    if DECAY == 2:
        factor = tl.full([BX], 1.0, dtype=tl.float32)
    else:
        factor = 1.0
    for i in range(highest - lowest):
        m = highest - 1 - i if REVERSE else lowest + i
        n = tl.load(segment + m)
        if REVERSE:
            enters = m + 1 == tl.load(first + n + 1)
        else:
            enters = m == tl.load(first + n)
        if enters:
            state = tl.zeros([BX, BU], dtype=tl.float32)
            if HAS_ENTER:
                state += state_of(enter, n, h, H, X, U, rows, columns, False)
        factor = tl.where(enters, 0.0, factor)
        tokens = tl.load(start + m).to(tl.int64) + tl.arange(0, C)
        inside = tokens < tl.load(end + m)
        ws = rows_of(w, tokens, inside, w_t, w_h, h, X, rows)
        us = rows_of(u, tokens, inside, u_t, u_h, h, U, columns)
        if DECAY == 1:
            weights = measured_of(decays, 2 if REVERSE else 3, tokens, inside, h, H, T)
            us = (us * weights[:, None]).to(us.dtype)
            over = tl.load(totals + m * H + h)
            state = state * over
            factor = factor * over
        if DECAY == 2:
            over = passed_over(totals, m, h, H, X, rows)
            state = state * over[:, None]
            factor = factor * over
        if REVERSE and SCALED:
            state += scale * tl.dot(tl.trans(ws), us, input_precision=PRECISION)
        else:
            state += tl.dot(tl.trans(ws), us, input_precision=PRECISION)
    places, mask = state_places(s, True, h, H, X, U, rows, columns, False)
    tl.store(states + places, state, mask=mask)
    if DECAY == 2:
        tl.store(factors + (s * H + h) * X + rows, factor, mask=rows < tl.where(tl.program_id(0) % tiles_u == 0, X, 0))
    else:
        tl.store(factors + s * H + h, factor, mask=tl.program_id(0) == 0)


@triton.jit
def _stretch_places(s, S, h, H, X, U, rows, columns):
    """Of the state of stretch s, nothing outside of 0 .. S - 1."""
    places, _ = state_places(s, True, h, H, X, U, rows, columns, False)
    wide = tl.where((s >= 0) & (s < S), U, 0)
    return places, (rows < X)[:, None] & (columns < wide)[None, :]


@triton.jit
def _joined(states, factors, state, summary, s, S, h, H, X, U, rows, columns, ROWS: tl.constexpr):
    """The state after stretch s, whose own is stored; outside of 0 .. S - 1 nothing is."""
    places, mask = _stretch_places(s, S, h, H, X, U, rows, columns)
    tl.store(states + places, state, mask=mask)
    if ROWS:
        there = rows < tl.where((s >= 0) & (s < S), X, 0)
        return state * tl.load(factors + (s * H + h) * X + rows, mask=there, other=1.0)[:, None] + summary
    return state * tl.load(factors + s * H + h, mask=(s >= 0) & (s < S), other=1.0) + summary


@triton.jit
def _summary(states, s, S, h, H, X, U, rows, columns):
    places, mask = _stretch_places(s, S, h, H, X, U, rows, columns)
    return tl.load(states + places, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["S"])
def join(
    states, factors, enter, leave, S, H, X, U, BX: tl.constexpr, BU: tl.constexpr, REVERSE: tl.constexpr,
    ROWS: tl.constexpr, HAS_ENTER: tl.constexpr, WANT_LEAVE: tl.constexpr,
):  # fmt: skip
    """Summaries become the states that enter the S stretches, in place. Grid: tiles of the state, H.

    Four at a time, so that loads do not wait for each other. enter, leave: [H, X, U], at the ends of all stretches.
    """
    tiles_u = tl.cdiv(U, BU)
    rows = (tl.program_id(0) // tiles_u) * BX + tl.arange(0, BX)
    columns = (tl.program_id(0) % tiles_u) * BU + tl.arange(0, BU)
    h = tl.program_id(1)
    step = -1 if REVERSE else 1
    state = tl.zeros([BX, BU], dtype=tl.float32)
    if HAS_ENTER:
        state += state_of(enter, h * 0, h, H, X, U, rows, columns, False)
    for i in range(0, S, 4):
        s = S - 1 - i if REVERSE else i
        first = _summary(states, s, S, h, H, X, U, rows, columns)
        second = _summary(states, s + step, S, h, H, X, U, rows, columns)
        third = _summary(states, s + 2 * step, S, h, H, X, U, rows, columns)
        fourth = _summary(states, s + 3 * step, S, h, H, X, U, rows, columns)
        state = _joined(states, factors, state, first, s, S, h, H, X, U, rows, columns, ROWS)
        state = _joined(states, factors, state, second, s + step, S, h, H, X, U, rows, columns, ROWS)
        state = _joined(states, factors, state, third, s + 2 * step, S, h, H, X, U, rows, columns, ROWS)
        state = _joined(states, factors, state, fourth, s + 3 * step, S, h, H, X, U, rows, columns, ROWS)
    if WANT_LEAVE:
        places, mask = state_places(h * 0, True, h, H, X, U, rows, columns, False)
        tl.store(leave + places, state, mask=mask)


@triton.jit(do_not_specialize=["N", "T", "M"])
def walk(
    x, w, u, decays, totals, scores, entered, enter, leave, y, z, sums, start, end, segment, first, N, scale,
    x_t, x_h, w_t, w_h, u_t, u_h, z_t, z_h, H, X, U, T, M,
    GROUP: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BU: tl.constexpr,
    REVERSE: tl.constexpr, DECAY: tl.constexpr, PLAIN: tl.constexpr, INSIDE: tl.constexpr, TRANSPOSED: tl.constexpr,
    HAS_ENTERED: tl.constexpr, HAS_ENTER: tl.constexpr, WANT_LEAVE: tl.constexpr, SUMS: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs y [T, H, U] of a walk from the states `entered`. Grid: tiles of U, H, stretches.

    INSIDE: 0 nothing inside a chunk; 1 products of x and w; 2 scores [T, H, C] that are given, lower triangles;
    3 nothing, but the products of x and w go to scores.
    PLAIN: of DECAY 1, the stretches all of whose chunks are plain, or the others. TRANSPOSED: states lie as [.., U, X].
    enter, leave: states of documents that enter and leave. SUMS: 1 sums over U of y * z by token, [tiles of U, T, H];
    2 over the tokens of a chunk by channel, [M, H, U].
    """
    columns = tl.program_id(0) * BU + tl.arange(0, BU)
    rows = tl.arange(0, BX)
    place = tl.arange(0, C)
    h, s = tl.program_id(1), tl.program_id(2)
    lowest = s * GROUP
    highest = tl.minimum(lowest + GROUP, tl.load(first + N))
    if DECAY == 1:
        stretch = lowest + tl.arange(0, GROUP)
        plain = tl.load(totals + (2 * M + stretch) * H + h, mask=stretch < highest, other=1.0)
        if (tl.min(plain, 0) == 1.0) != PLAIN:
            return
    state = tl.zeros([BX, BU], dtype=tl.float32)
    if HAS_ENTERED:
        state += state_of(entered, s, h, H, X, U, rows, columns, TRANSPOSED)
    for i in range(highest - lowest):
        m = highest - 1 - i if REVERSE else lowest + i
        n = tl.load(segment + m)
        begins = m == tl.load(first + n)
        ends = m + 1 == tl.load(first + n + 1)
        enters = ends if REVERSE else begins
        if enters:
            state = tl.zeros([BX, BU], dtype=tl.float32)
            if HAS_ENTER:
                state += state_of(enter, n, h, H, X, U, rows, columns, TRANSPOSED)
        tokens = tl.load(start + m).to(tl.int64) + place
        inside = tokens < tl.load(end + m)
        xs = rows_of(x, tokens, inside, x_t, x_h, h, X, rows)
        ws = rows_of(w, tokens, inside, w_t, w_h, h, X, rows)
        us = rows_of(u, tokens, inside, u_t, u_h, h, U, columns)
        out = tl.dot(xs, state.to(xs.dtype), input_precision=PRECISION)
        if DECAY == 1:
            out *= measured_of(decays, 3 if REVERSE else 2, tokens, inside, h, H, T)[:, None]
        if INSIDE == 1:
            pairs = tl.dot(xs, tl.trans(ws), input_precision=PRECISION)
            # Rounded before anything is scaled: dq and dk round alike, and what cancels in dg cancels.
            if DECAY == 1 and not PLAIN:
                c, resets = sums_of(decays, tokens, inside, h, H, T)
                pairs *= between(c, resets, C, REVERSE)
                near = tl.dot(pairs.to(us.dtype), us, input_precision=PRECISION)
            if DECAY == 1 and PLAIN:
                us = (us * measured_of(decays, 4 if REVERSE else 5, tokens, inside, h, H, T)[:, None]).to(us.dtype)
                near = tl.dot(earlier(pairs, place, REVERSE).to(us.dtype), us, input_precision=PRECISION)
                near *= measured_of(decays, 5 if REVERSE else 4, tokens, inside, h, H, T)[:, None]
            if DECAY != 1:
                near = tl.dot(earlier(pairs, place, REVERSE).to(us.dtype), us, input_precision=PRECISION)
            out += near * scale if REVERSE and SCALED else near
        if INSIDE == 3:
            pairs = tl.dot(xs, tl.trans(ws), input_precision=PRECISION).to(scores.dtype.element_ty)
            if tl.program_id(0) == 0:
                tl.store(scores + (tokens[:, None] * H + h) * C + place[None, :], pairs, mask=inside[:, None])
        if INSIDE == 2:
            if REVERSE:
                given = tl.load(
                    scores + (tokens[None, :] * H + h) * C + place[:, None], mask=inside[None, :], other=0.0
                )
            else:
                given = tl.load(
                    scores + (tokens[:, None] * H + h) * C + place[None, :], mask=inside[:, None], other=0.0
                )
            out += tl.dot(given, us, input_precision=PRECISION)
        if SCALED and not REVERSE:
            out *= scale
        there = inside[:, None] & (columns < U)[None, :]
        tl.store(y + (tokens[:, None] * H + h) * U + columns[None, :], out.to(y.dtype.element_ty), mask=there)
        if SUMS > 0:
            out *= rows_of(z, tokens, inside, z_t, z_h, h, U, columns)
            if SUMS == 1:
                row_sums = tl.sum(out, 1)
                tl.store(sums + (tl.program_id(0).to(tl.int64) * T + tokens) * H + h, row_sums, mask=inside)
            else:
                column_sums = tl.sum(out, 0)
                tl.store(sums + (m.to(tl.int64) * H + h) * U + columns, column_sums, mask=columns < U)
        if DECAY == 1:
            state = state * tl.load(totals + m * H + h)
            if not PLAIN:
                us = (us * measured_of(decays, 2 if REVERSE else 3, tokens, inside, h, H, T)[:, None]).to(us.dtype)
        if DECAY == 2:
            state = state * passed_over(totals, m, h, H, X, rows)[:, None]
        if DECAY == 3:
            state = state * passed_over(totals, m, h, H, U, columns)[None, :]
        added = tl.dot(tl.trans(ws), us, input_precision=PRECISION)
        if REVERSE and SCALED:
            added *= scale
        if DECAY == 1 and PLAIN:
            added *= tl.load(totals + (M + m) * H + h)
        state += added
        if WANT_LEAVE:
            leaves = begins if REVERSE else ends
            if leaves:
                places, mask = state_places(n, True, h, H, X, U, rows, columns, TRANSPOSED)
                tl.store(leave + places, state, mask=mask)


@triton.jit(do_not_specialize=["N", "S", "T"])
def decay_gradients(
    read, written, states, dstates, ended, dg, start, end, segment, first, N, S, tiles_read, tiles_written, H, K, V, T,
    GROUP: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BU: tl.constexpr,
    HAS_STATES: tl.constexpr, HAS_ENDED: tl.constexpr,
):  # fmt: skip
    """Of DECAY 1: dg_j = sum over t >= j of q_t . dq_t - k_t . dk_t in the chunk, and <S, R> at its end.

    read, written: [tiles, T, H], sums of q . dq and k . dk; states, dstates: what enters each stretch from either side;
    ended: [N, H], <S, R> at the end of each document. Grid: H, stretches.
    """
    h, s = tl.program_id(0), tl.program_id(1)
    lowest = s * GROUP
    highest = tl.minimum(lowest + GROUP, tl.load(first + N))
    passing = 0.0
    if HAS_STATES:  # noqa: SIM102 - a constant, not a value of the kernel
        if s + 1 < S:
            for i in range(tl.cdiv(K, BX)):
                for j in range(tl.cdiv(V, BU)):
                    rows, columns = i * BX + tl.arange(0, BX), j * BU + tl.arange(0, BU)
                    state = state_of(states, s + 1, h, H, K, V, rows, columns, False)
                    passing += tl.sum(tl.sum(state * state_of(dstates, s, h, H, K, V, rows, columns, False), 1), 0)
    for i in range(highest - lowest):
        m = highest - 1 - i
        n = tl.load(segment + m)
        ends = m + 1 == tl.load(first + n + 1)
        if HAS_ENDED:
            passing = tl.where(ends, tl.load(ended + n * H + h), passing)
        else:
            passing = tl.where(ends, 0.0, passing)
        tokens = tl.load(start + m).to(tl.int64) + tl.arange(0, C)
        inside = tokens < tl.load(end + m)
        change = tl.zeros([C], dtype=tl.float32)
        for j in range(tiles_read):
            change += tl.load(read + (j * T + tokens) * H + h, mask=inside, other=0.0)
        for j in range(tiles_written):
            change -= tl.load(written + (j * T + tokens) * H + h, mask=inside, other=0.0)
        total = tl.sum(change, 0)
        tl.store(dg + tokens * H + h, total - tl.cumsum(change, 0) + change + passing, mask=inside)
        passing += total
