"""Triton kernels of state space duality, over heads that share B and C. With c the sums of dt A in a chunk of L tokens:

    y_t = e^{c_t} S^T C_t + sum over the chunk's s <= t of D_ts (C_t . B_s) dt_s x_s
    S'  = e^{c_L} S       + sum over the chunk of e^{c_L - c_s} B_s (dt_s x_s)^T          D_ts = e^{c_t - c_s}

S [K, V] is what enters the chunk. dx is such a walk from the last chunk to the first, (B, C, dy) in place of (C, B, x),
whose "state" R is the gradient of S. dB, dC and ddt want S and R at every chunk: `advance` and the walk back store
them, rounded to the type of the inputs, and `gradients` takes chunks one by one over all heads of a group.

Stretches of chunks, `entered`, `enter` and `leave` are those of `linear.walk_kernels`. x and dy are read as they come:
steps dt are factors in the products. A log decay dt A below -20 counts as -20: e^-20 is under the rounding of float32.
No product of a product is transposed, which Triton 3.4 to 3.7.0 miscompiles on Hopper GPUs
(https://github.com/fla-org/flash-linear-attention/issues/640).

x, y: [T, H, V]; B, C: [T, G, K], strides of tokens and heads as given; head h is of group h // SHARED. States of chunks
are of those from stretch `since_s` on.
"""

# pyright: basic, reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false

import triton
import triton.language as tl

from torchlinearmoe.kernels.linear.walk_kernels import NOTHING, RESET


@triton.jit
def measure(dt, A, measured, totals, start, end, dt_t, dt_h, H, L: tl.constexpr, BH: tl.constexpr):
    """measured [M, H, 2, L]: sums of log decays dt A over a chunk's tokens up to each, and dt; totals [M, H]: the sums
    at the chunks' ends. Behind a chunk's last token the sums stay and dt is zero. Grid: M, tiles of H."""
    m, place = tl.program_id(0), tl.arange(0, L)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    token = tl.load(start + m).to(tl.int64)
    inside = token + place < tl.load(end + m)
    there = (heads < H)[None, :]
    places = token * dt_t + (place[:, None] * dt_t + heads[None, :] * dt_h)
    steps = tl.load(dt + places, mask=inside[:, None] & there, other=0.0)
    decays = steps * tl.load(A + heads, mask=heads < H, other=0.0)[None, :]
    decays = tl.where(decays < RESET, RESET, decays)
    decays = tl.where(inside[:, None] & there, decays, 0.0)
    places = m.to(tl.int64) * H * 2 * L + (heads[None, :] * 2 * L + place[:, None])
    tl.store(measured + places, tl.cumsum(decays, 0), mask=there)
    tl.store(measured + places + L, steps, mask=there)
    tl.store(totals + m * H + heads, tl.sum(decays, 0), mask=heads < H)


@triton.jit
def decays_of(measured, totals, m, h, H, place, L: tl.constexpr):
    """Of `measure`: sums c and steps dt [L], and the sum at the chunk's end."""
    sums = measured + (m.to(tl.int64) * H + h) * (2 * L)
    return tl.load(sums + place), tl.load(sums + L + place), tl.load(totals + m * H + h)


@triton.jit
def rows_of(x, token, place, inside, stride_t, stride_h, h, width, columns, EVEN: tl.constexpr):
    """[L, B] of x [T, H, width], from `token` on. EVEN: there are no more columns than width."""
    first = x + token * stride_t + h.to(tl.int64) * stride_h
    mask = inside[:, None] if EVEN else inside[:, None] & (columns < width)[None, :]
    return tl.load(first + (place[:, None] * stride_t + columns[None, :]), mask=mask, other=0.0)


@triton.jit
def state_of(states, row, h, H, K, V, rows, columns, EVEN: tl.constexpr):
    """[rows, columns] of the state at `row` of [.., H, K, V]."""
    first = states + (row.to(tl.int64) * H + h) * K * V
    if EVEN:
        return tl.load(first + (rows[:, None] * V + columns[None, :]))
    mask = (rows < K)[:, None] & (columns < V)[None, :]
    return tl.load(first + (rows[:, None] * V + columns[None, :]), mask=mask, other=0.0)


@triton.jit
def store_state(states, state, row, h, H, K, V, rows, columns, EVEN: tl.constexpr):
    first = states + (row.to(tl.int64) * H + h) * K * V
    if EVEN:
        tl.store(first + (rows[:, None] * V + columns[None, :]), state)
    else:
        mask = (rows < K)[:, None] & (columns < V)[None, :]
        tl.store(first + (rows[:, None] * V + columns[None, :]), state, mask=mask)


@triton.jit
def between(c, L: tl.constexpr, REVERSE: tl.constexpr):
    """e^{c_t - c_s} where s <= t, else 0: [t, s], or [s, t]."""
    place = tl.arange(0, L)
    if REVERSE:
        return tl.exp(tl.where(place[:, None] <= place[None, :], c[None, :] - c[:, None], NOTHING))
    return tl.exp(tl.where(place[:, None] >= place[None, :], c[:, None] - c[None, :], NOTHING))


@triton.jit
def _entering(
    enter, n, h, H, K, V, rows, columns, BK: tl.constexpr, BV: tl.constexpr, HAS_ENTER: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """The state that enters a document, or a stretch, where one does."""
    state = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_ENTER:
        state += state_of(enter, n, h, H, K, V, rows, columns, EVEN)
    return state


@triton.jit(do_not_specialize=["N", "since_s"])
def advance(
    w, u, measured, totals, entered, enter, states, factors, start, end, segment, first, N,
    w_t, w_g, u_t, u_h, H, K, V, SHARED, since_s,
    GROUP: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, EVERY: tl.constexpr, HAS_ENTERED: tl.constexpr, HAS_ENTER: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state at each stretch's end, entered empty, and the factor of what enters, [stretches, H]; or, with EVERY,
    the states that enter the chunks, from those that enter the stretches, `entered`.

    (w, u) = (B, x), or in reverse (C, dy). Grid: tiles of V, H, stretches.
    """
    rows, columns, place = tl.arange(0, BK), tl.program_id(0) * BV + tl.arange(0, BV), tl.arange(0, L)
    h, s = tl.program_id(1), tl.program_id(2) + since_s
    lowest = s * GROUP
    highest = tl.minimum(lowest + GROUP, tl.load(first + N))
    state = _entering(entered, s, h, H, K, V, rows, columns, BK, BV, HAS_ENTERED, EVEN)
    factor = 1.0
    for i in range(highest - lowest):
        m = highest - 1 - i if REVERSE else lowest + i
        n = tl.load(segment + m)
        if REVERSE:
            enters = m + 1 == tl.load(first + n + 1)
        else:
            enters = m == tl.load(first + n)
        if enters:
            state = _entering(enter, n, h, H, K, V, rows, columns, BK, BV, HAS_ENTER, EVEN)
        if EVERY:
            kept = state.to(states.dtype.element_ty)
            store_state(states, kept, m - since_s * GROUP, h, H, K, V, rows, columns, EVEN)
        token = tl.load(start + m).to(tl.int64)
        inside = token + place < tl.load(end + m)
        ws = rows_of(w, token, place, inside, w_t, w_g, h // SHARED, K, rows, EVEN)
        us = rows_of(u, token, place, inside, u_t, u_h, h, V, columns, EVEN)
        c, dt, total = decays_of(measured, totals, m, h, H, place, L)
        weights = tl.exp(c) if REVERSE else dt * tl.exp(total - c)
        us = (us * weights[:, None]).to(us.dtype)
        over = tl.exp(total)
        state = state * over + tl.dot(tl.trans(ws), us, input_precision=PRECISION)
        factor = tl.where(enters, 0.0, factor) * over
    if not EVERY:
        store_state(states, state, s, h, H, K, V, rows, columns, EVEN)
        tl.store(factors + s * H + h, factor, mask=tl.program_id(0) == 0)


@triton.jit(do_not_specialize=["N", "since_s"])
def walk(
    x, w, u, measured, totals, entered, enter, leave, y, states, start, end, segment, first, N,
    x_t, x_g, w_t, w_g, u_t, u_h, H, K, V, SHARED, since_s,
    GROUP: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, HAS_ENTERED: tl.constexpr, HAS_ENTER: tl.constexpr, WANT_LEAVE: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of (x, w, u) = (C, B, x), or in reverse dx of (B, C, dy) and the states R behind the chunks.

    Grid: tiles of V, H, stretches.
    """
    rows, columns, place = tl.arange(0, BK), tl.program_id(0) * BV + tl.arange(0, BV), tl.arange(0, L)
    h, s = tl.program_id(1), tl.program_id(2) + since_s
    lowest = s * GROUP
    highest = tl.minimum(lowest + GROUP, tl.load(first + N))
    state = _entering(entered, s, h, H, K, V, rows, columns, BK, BV, HAS_ENTERED, EVEN)
    for i in range(highest - lowest):
        m = highest - 1 - i if REVERSE else lowest + i
        n = tl.load(segment + m)
        begins = m == tl.load(first + n)
        ends = m + 1 == tl.load(first + n + 1)
        enters = ends if REVERSE else begins
        if enters:
            state = _entering(enter, n, h, H, K, V, rows, columns, BK, BV, HAS_ENTER, EVEN)
        token = tl.load(start + m).to(tl.int64)
        inside = token + place < tl.load(end + m)
        xs = rows_of(x, token, place, inside, x_t, x_g, h // SHARED, K, rows, EVEN)
        ws = rows_of(w, token, place, inside, w_t, w_g, h // SHARED, K, rows, EVEN)
        us = rows_of(u, token, place, inside, u_t, u_h, h, V, columns, EVEN)
        c, dt, total = decays_of(measured, totals, m, h, H, place, L)
        pairs = tl.dot(xs, tl.trans(ws), input_precision=PRECISION) * between(c, L, REVERSE)
        if not REVERSE:
            pairs *= dt[None, :]
        pairs = pairs.to(us.dtype)
        read = state.to(xs.dtype)
        if REVERSE:
            store_state(states, read, m - since_s * GROUP, h, H, K, V, rows, columns, EVEN)
        since, until = tl.exp(c), tl.exp(total - c)
        out = tl.dot(xs, read, input_precision=PRECISION) * (until if REVERSE else since)[:, None]
        out += tl.dot(pairs, us, input_precision=PRECISION)
        if REVERSE:
            out *= dt[:, None]
        there = inside[:, None] & (columns < V)[None, :]
        first_y = y + (token * H + h) * V
        tl.store(first_y + (place[:, None] * H * V + columns[None, :]), out.to(y.dtype.element_ty), mask=there)
        us = (us * (since if REVERSE else dt * until)[:, None]).to(us.dtype)
        state = state * tl.exp(total) + tl.dot(tl.trans(ws), us, input_precision=PRECISION)
        if WANT_LEAVE:
            leaves = begins if REVERSE else ends
            if leaves:
                store_state(leave, state, n, h, H, K, V, rows, columns, EVEN)


@triton.jit(do_not_specialize=["N", "T", "since_m"])
def gradients(
    x, dy, B, C, measured, totals, states, dstates, sums, dB, dC, dpairs, start, end, first, N,
    x_t, x_h, dy_t, dy_h, B_t, B_g, C_t, C_g, H, G, K, V, SHARED, PART, T, since_m,
    L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The other gradients as sums, of a chunk and PART heads of a group. Grid: chunks, G, SHARED / PART.

    states, dstates: S that enters each chunk, R that enters it from behind. dB, dC [parts, T, G, K]: what comes of S
    and R; dpairs [parts, T, G, L]: the gradient of C B^T; over a part's heads. sums [M, H, 4, L], with w_ts =
    D_ts (C_t . B_s) (dy_t . x_s): 0 sum over s of w_ts dt_s + e^{c_t} dy_t . S^T C_t, 1 sum over t of w_ts,
    2 e^{c_L - c_s} x_s . R^T B_s, 3 what adds up to e^{c_L} <S, R>.
    """
    m, g, part = tl.program_id(0) + since_m, tl.program_id(1), tl.program_id(2)
    if m >= tl.load(first + N):
        return
    token, place, channels = tl.load(start + m).to(tl.int64), tl.arange(0, L), tl.arange(0, BK)
    inside = token + place < tl.load(end + m)
    Bs = rows_of(B, token, place, inside, B_t, B_g, g, K, channels, EVEN)
    Cs = rows_of(C, token, place, inside, C_t, C_g, g, K, channels, EVEN)
    pairs = tl.dot(Cs, tl.trans(Bs), input_precision=PRECISION)
    dBs, dCs = tl.zeros([L, BK], dtype=tl.float32), tl.zeros([L, BK], dtype=tl.float32)
    pair_sums = tl.zeros([L, L], dtype=tl.float32)
    zeros, diagonal = tl.zeros([L], dtype=tl.float32), place[:, None] == place[None, :]
    tl.static_assert(BV == L)
    read, near_x, far_x, passing = zeros, zeros, zeros, zeros
    for i in range(PART * TILES):
        h = g * SHARED + part * PART + i // TILES
        columns = (i % TILES) * BV + place
        if TILES == 1 or i % TILES == 0:
            read, near_x, far_x, passing = zeros, zeros, zeros, zeros
        xs = rows_of(x, token, place, inside, x_t, x_h, h, V, columns, EVEN)
        dys = rows_of(dy, token, place, inside, dy_t, dy_h, h, V, columns, EVEN)
        S = state_of(states, m - since_m, h, H, K, V, channels, columns, EVEN)
        R = state_of(dstates, m - since_m, h, H, K, V, channels, columns, EVEN)
        c, dt, total = decays_of(measured, totals, m, h, H, place, L)
        since, until = tl.exp(c), tl.exp(total - c)
        near = tl.dot(dys, tl.trans(xs), input_precision=PRECISION) * between(c, L, False)
        w = near * pairs
        near_x += tl.sum(w, 0)
        pair_sums += near * dt[None, :]
        far = tl.dot(Cs, S, input_precision=PRECISION) * since[:, None]
        read += tl.sum(w * dt[None, :] + far * dys, 1)
        dCs += tl.dot(dys, tl.trans(S), input_precision=PRECISION) * since[:, None]
        far_x += until * tl.sum(tl.dot(Bs, R, input_precision=PRECISION) * xs, 1)
        dBs += tl.dot(xs, tl.trans(R), input_precision=PRECISION) * (until * dt)[:, None]
        over = tl.dot(tl.trans(S), R, input_precision=PRECISION) * tl.exp(total)  # <S, R> is the trace
        passing += tl.sum(tl.where(diagonal, over, 0.0), 1)
        # Of several tiles the last one's are whole.
        first_sum = sums + (m.to(tl.int64) * H + h) * (4 * L)
        tl.store(first_sum + place, read)
        tl.store(first_sum + L + place, near_x)
        tl.store(first_sum + 2 * L + place, far_x)
        tl.store(first_sum + 3 * L + place, passing)
    first_t = part.to(tl.int64) * T + token
    there = inside[:, None] & (channels < K)[None, :]
    places = (first_t * G + g) * K + (place[:, None] * G * K + channels[None, :])
    tl.store(dB + places, dBs, mask=there)
    tl.store(dC + places, dCs, mask=there)
    places = (first_t * G + g) * L + (place[:, None] * G * L + place[None, :])
    tl.store(dpairs + places, pair_sums, mask=inside[:, None])


@triton.jit(do_not_specialize=["N"])
def steps(A, measured, sums, ddt, dA, start, end, first, N, H, L: tl.constexpr, BH: tl.constexpr):
    """ddt [T, H] and dA [M, H], by chunk, of what `gradients` sums. Grid: M, tiles of H.

    The log decay of token j has the gradient g_j = sum over s < j <= t of w_ts dt_s + sum over t >= j of
    e^{c_t} dy_t . S^T C_t + sum over s < j of e^{c_L - c_s} dt_s x_s . R^T B_s + e^{c_L} <S, R>; none
    where it counts as -20.
    """
    m, place = tl.program_id(0), tl.arange(0, L)
    if m >= tl.load(first + N):
        return
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    there = (heads < H)[:, None]
    token = tl.load(start + m).to(tl.int64)
    inside = token + place < tl.load(end + m)
    row = m.to(tl.int64) * H + heads[:, None]
    first_sum = sums + row * (4 * L) + place[None, :]
    read = tl.load(first_sum, mask=there, other=0.0)
    near_x = tl.load(first_sum + L, mask=there, other=0.0)
    far_x = tl.load(first_sum + 2 * L, mask=there, other=0.0)
    passing = tl.load(first_sum + 3 * L, mask=there, other=0.0)
    dt = tl.load(measured + row * (2 * L) + L + place[None, :], mask=there, other=0.0)
    opened, closed = read - near_x * dt, far_x * dt
    dg = tl.sum(opened + passing, 1)[:, None] + opened - closed + tl.cumsum(closed - opened, 1)
    rate = tl.load(A + heads, mask=heads < H, other=0.0)[:, None]
    dg = tl.where(dt * rate < RESET, 0.0, dg)
    places = token * H + heads[:, None] + place[None, :] * H
    tl.store(ddt + places, rate * dg + near_x + far_x, mask=there & inside[None, :])
    tl.store(dA + m * H + heads, tl.sum(dg * dt, 1), mask=heads < H)


@triton.jit(do_not_specialize=["T"])
def finish(
    B, C, dB_parts, dC_parts, dpairs, dB, dC, start, end, parts, B_t, B_g, C_t, C_g, G, K, T,
    L: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dB and dC [T, G, K] of what `gradients` leaves. Grid: M, G."""
    m, g = tl.program_id(0), tl.program_id(1)
    token, place, channels = tl.load(start + m).to(tl.int64), tl.arange(0, L), tl.arange(0, BK)
    inside = token + place < tl.load(end + m)
    there = inside[:, None] & (channels < K)[None, :]
    dBs, dCs = tl.zeros([L, BK], dtype=tl.float32), tl.zeros([L, BK], dtype=tl.float32)
    read, written = tl.zeros([L, L], dtype=tl.float32), tl.zeros([L, L], dtype=tl.float32)
    places = place[:, None] * G * K + channels[None, :]
    for part in range(parts):
        first = (token + part * T.to(tl.int64)) * G + g
        dBs += tl.load(dB_parts + first * K + places, mask=there, other=0.0)
        dCs += tl.load(dC_parts + first * K + places, mask=there, other=0.0)
        both = dpairs + first * L
        read += tl.load(both + (place[:, None] * G * L + place[None, :]), mask=inside[:, None], other=0.0)
        written += tl.load(both + (place[None, :] * G * L + place[:, None]), mask=inside[None, :], other=0.0)
    Bs = rows_of(B, token, place, inside, B_t, B_g, g, K, channels, EVEN)
    Cs = rows_of(C, token, place, inside, C_t, C_g, g, K, channels, EVEN)
    dCs += tl.dot(read.to(Bs.dtype), Bs, input_precision=PRECISION)
    dBs += tl.dot(written.to(Cs.dtype), Cs, input_precision=PRECISION)
    places += (token * G + g) * K
    tl.store(dB + places, dBs.to(dB.dtype.element_ty), mask=there)
    tl.store(dC + places, dCs.to(dC.dtype.element_ty), mask=there)
