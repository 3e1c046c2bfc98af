"""Triton kernels of S_t = e^{g_t} S_{t-1} + k_t v_t^T, o_t = scale * q_t^T S_t, one decay per token and head.

A chunk of C tokens that S enters, with c_t the sum of its log decays up to and including t:

    o_t   = scale * (e^{c_t} q_t^T S + sum_{s <= t} e^{c_t - c_s} (q_t . k_s) v_s)
    S'    = e^{c_C} S + sum_s e^{c_C - c_s} k_s v_s^T

Backward, with R the gradient of S' and w_ts = scale * e^{c_t - c_s} (q_t . k_s) (do_t . v_s):

    dS    = e^{c_C} R + scale * sum_t e^{c_t} q_t do_t^T
    dg_j  = sum_{s < j <= t} w_ts + sum_{t >= j} scale e^{c_t} q_t^T S do_t + sum_{s < j} e^{c_C - c_s} k_s^T R v_s
            + e^{c_C} <S, R>

A log decay below -20 counts as a reset: e^-20 is under the rounding of float32. So the c, which are subtracted from
each other, stay small, whatever the decays, -inf too.

Matrices that are wanted transposed are loaded or multiplied that way; no product of a product is transposed, which
Triton 3.4 to 3.7.0 miscompiles on Hopper GPUs (https://github.com/fla-org/flash-linear-attention/issues/640).

Tokens of all documents lie one after the other: q, k: [T, H, K]; v: [T, H, V]; g: [T, H]; states [chunks, H, K, V].
"""

# pyright: basic, reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false

import triton
import triton.language as tl

RESET = tl.constexpr(-20.0)


@triton.jit
def _log_decays(g, tokens, inside, h, H, HAS_G: tl.constexpr):
    """Of a chunk: c, the resets so far, and both at the chunk's end."""
    if HAS_G:
        decays = tl.load(g + tokens * H + h, mask=inside, other=0.0)
    else:
        decays = tl.zeros_like(tokens).to(tl.float32)
    resets = tl.where(decays < RESET, 1.0, 0.0)
    decays = tl.where(decays < RESET, 0.0, decays)
    return tl.cumsum(decays, 0), tl.cumsum(resets, 0), tl.sum(decays, 0), tl.sum(resets, 0)


@triton.jit
def _since_start(c, n):
    return tl.where(n == 0.0, tl.exp(c), 0.0)


@triton.jit
def _until_end(c, n, total, resets):
    return tl.where(n == resets, tl.exp(total - c), 0.0)


@triton.jit
def _between(c, n, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    """e^{c_t - c_s} where s <= t, else 0: [t, s], or [s, t]."""
    place = tl.arange(0, C)
    if TRANSPOSED:
        seen = (place[:, None] <= place[None, :]) & (n[:, None] == n[None, :])
        return tl.where(seen, tl.exp(tl.where(seen, c[None, :] - c[:, None], 0.0)), 0.0)
    seen = (place[:, None] >= place[None, :]) & (n[:, None] == n[None, :])
    return tl.where(seen, tl.exp(tl.where(seen, c[:, None] - c[None, :], 0.0)), 0.0)


@triton.jit
def _rows(x, tokens, inside, h, H, D, columns):
    """[C, BD] of x [T, H, D]."""
    return tl.load(
        x + (tokens[:, None] * H + h) * D + columns[None, :], mask=inside[:, None] & (columns < D)[None, :], other=0.0
    )


@triton.jit
def _rows_transposed(x, tokens, inside, h, H, D, columns):
    """[BD, C] of x [T, H, D]."""
    return tl.load(
        x + (tokens[None, :] * H + h) * D + columns[:, None], mask=inside[None, :] & (columns < D)[:, None], other=0.0
    )


@triton.jit
def _state_offsets(row, rows_k, columns_v, K, V):
    """[BK, BV] of the state at `row` of [rows, K, V], and where it is."""
    return (row * K + rows_k[:, None]) * V + columns_v[None, :], (rows_k < K)[:, None] & (columns_v < V)[None, :]


@triton.jit
def _state_offsets_transposed(row, rows_k, columns_v, K, V):
    """[BV, BK] of the same."""
    return (row * K + rows_k[None, :]) * V + columns_v[:, None], (rows_k < K)[None, :] & (columns_v < V)[:, None]


@triton.jit
def enter_chunks(
    k, v, g, initial, states, final, start, end, first, H, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
    HAS_G: tl.constexpr, HAS_INITIAL: tl.constexpr, WANT_FINAL: tl.constexpr,
):  # fmt: skip
    """The state that enters each chunk. Grid: tiles of the state, H, documents."""
    tiles_v = tl.cdiv(V, BV)
    rows_k = (tl.program_id(0) // tiles_v) * BK + tl.arange(0, BK)
    columns_v = (tl.program_id(0) % tiles_v) * BV + tl.arange(0, BV)
    h, n = tl.program_id(1), tl.program_id(2)
    state = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_INITIAL:
        offsets, mask = _state_offsets((n * H + h).to(tl.int64), rows_k, columns_v, K, V)
        state += tl.load(initial + offsets, mask=mask, other=0.0)
    for m in range(tl.load(first + n), tl.load(first + n + 1)):
        offsets, mask = _state_offsets((m * H + h).to(tl.int64), rows_k, columns_v, K, V)
        tl.store(states + offsets, state, mask=mask)
        tokens = tl.load(start + m).to(tl.int64) + tl.arange(0, C)
        inside = tokens < tl.load(end + m)
        keys = _rows_transposed(k, tokens, inside, h, H, K, rows_k)
        values = _rows(v, tokens, inside, h, H, V, columns_v)
        if HAS_G:
            c, resets, total, all_resets = _log_decays(g, tokens, inside, h, H, HAS_G)
            values = (values * _until_end(c, resets, total, all_resets)[:, None]).to(values.dtype)
            state = state * _since_start(total, all_resets)
        state += tl.dot(keys, values, input_precision=PRECISION)
    if WANT_FINAL:
        offsets, mask = _state_offsets((n * H + h).to(tl.int64), rows_k, columns_v, K, V)
        tl.store(final + offsets, state, mask=mask)


@triton.jit
def read_chunks(
    q, k, v, g, states, o, start, end, scale, H, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, HAS_G: tl.constexpr,
):  # fmt: skip
    """Outputs. Grid: tiles of V, H, chunks."""
    columns_v = tl.program_id(0) * BV + tl.arange(0, BV)
    h, m = tl.program_id(1), tl.program_id(2)
    tokens = tl.load(start + m).to(tl.int64) + tl.arange(0, C)
    inside = tokens < tl.load(end + m)
    scores = tl.zeros([C, C], dtype=tl.float32)
    out = tl.zeros([C, BV], dtype=tl.float32)
    for i in range(tl.cdiv(K, BK)):
        rows_k = i * BK + tl.arange(0, BK)
        queries = _rows(q, tokens, inside, h, H, K, rows_k)
        keys = _rows_transposed(k, tokens, inside, h, H, K, rows_k)
        offsets, mask = _state_offsets((m * H + h).to(tl.int64), rows_k, columns_v, K, V)
        state = tl.load(states + offsets, mask=mask, other=0.0)
        scores += tl.dot(queries, keys, input_precision=PRECISION)
        out += tl.dot(queries, state.to(queries.dtype), input_precision=PRECISION)
    c, n, _, _ = _log_decays(g, tokens, inside, h, H, HAS_G)
    scores *= _between(c, n, C, False)
    out *= _since_start(c, n)[:, None]
    values = _rows(v, tokens, inside, h, H, V, columns_v)
    out += tl.dot(scores.to(values.dtype), values, input_precision=PRECISION)
    mask = inside[:, None] & (columns_v < V)[None, :]
    tl.store(o + (tokens[:, None] * H + h) * V + columns_v[None, :], (out * scale).to(o.dtype.element_ty), mask=mask)


@triton.jit
def leave_chunks(
    q, do, g, dfinal, dstates, dinitial, start, end, first, scale, H, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
    HAS_G: tl.constexpr, HAS_FINAL: tl.constexpr, WANT_INITIAL: tl.constexpr,
):  # fmt: skip
    """The gradient of the state that leaves each chunk. Grid: tiles of the state, H, documents."""
    tiles_v = tl.cdiv(V, BV)
    rows_k = (tl.program_id(0) // tiles_v) * BK + tl.arange(0, BK)
    columns_v = (tl.program_id(0) % tiles_v) * BV + tl.arange(0, BV)
    h, n = tl.program_id(1), tl.program_id(2)
    dstate = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_FINAL:
        offsets, mask = _state_offsets((n * H + h).to(tl.int64), rows_k, columns_v, K, V)
        dstate += tl.load(dfinal + offsets, mask=mask, other=0.0)
    begin, finish = tl.load(first + n), tl.load(first + n + 1)
    for i in range(finish - begin):
        m = finish - 1 - i
        offsets, mask = _state_offsets((m * H + h).to(tl.int64), rows_k, columns_v, K, V)
        tl.store(dstates + offsets, dstate, mask=mask)
        tokens = tl.load(start + m).to(tl.int64) + tl.arange(0, C)
        inside = tokens < tl.load(end + m)
        queries = _rows_transposed(q, tokens, inside, h, H, K, rows_k)
        douts = _rows(do, tokens, inside, h, H, V, columns_v)
        if HAS_G:
            c, resets, total, all_resets = _log_decays(g, tokens, inside, h, H, HAS_G)
            douts = (douts * (scale * _since_start(c, resets))[:, None]).to(douts.dtype)
            dstate = dstate * _since_start(total, all_resets)
        else:
            douts = (douts * scale).to(douts.dtype)
        dstate += tl.dot(queries, douts, input_precision=PRECISION)
    if WANT_INITIAL:
        offsets, mask = _state_offsets((n * H + h).to(tl.int64), rows_k, columns_v, K, V)
        tl.store(dinitial + offsets, dstate, mask=mask)


@triton.jit
def query_key_gradients(
    q, k, v, do, g, states, dstates, dq, dk, start, end, scale, H, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, HAS_G: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of K, H, chunks."""
    rows_k = tl.program_id(0) * BK + tl.arange(0, BK)
    h, m = tl.program_id(1), tl.program_id(2)
    tokens = tl.load(start + m).to(tl.int64) + tl.arange(0, C)
    inside = tokens < tl.load(end + m)
    dqueries = tl.zeros([C, BK], dtype=tl.float32)
    dkeys = tl.zeros([C, BK], dtype=tl.float32)
    dscores = tl.zeros([C, C], dtype=tl.float32)
    dscores_transposed = tl.zeros([C, C], dtype=tl.float32)
    for i in range(tl.cdiv(V, BV)):
        columns_v = i * BV + tl.arange(0, BV)
        values = _rows(v, tokens, inside, h, H, V, columns_v)
        douts = _rows(do, tokens, inside, h, H, V, columns_v)
        dscores += tl.dot(douts, _rows_transposed(v, tokens, inside, h, H, V, columns_v), input_precision=PRECISION)
        dscores_transposed += tl.dot(
            values, _rows_transposed(do, tokens, inside, h, H, V, columns_v), input_precision=PRECISION
        )
        offsets, mask = _state_offsets_transposed((m * H + h).to(tl.int64), rows_k, columns_v, K, V)
        state = tl.load(states + offsets, mask=mask, other=0.0).to(douts.dtype)
        dstate = tl.load(dstates + offsets, mask=mask, other=0.0).to(values.dtype)
        dqueries += tl.dot(douts, state, input_precision=PRECISION)
        dkeys += tl.dot(values, dstate, input_precision=PRECISION)
    c, n, total, resets = _log_decays(g, tokens, inside, h, H, HAS_G)
    dqueries *= (scale * _since_start(c, n))[:, None]
    dkeys *= _until_end(c, n, total, resets)[:, None]
    dscores *= scale * _between(c, n, C, False)
    dscores_transposed *= scale * _between(c, n, C, True)
    keys = _rows(k, tokens, inside, h, H, K, rows_k)
    queries = _rows(q, tokens, inside, h, H, K, rows_k)
    dqueries += tl.dot(dscores.to(keys.dtype), keys, input_precision=PRECISION)
    dkeys += tl.dot(dscores_transposed.to(queries.dtype), queries, input_precision=PRECISION)
    places = (tokens[:, None] * H + h) * K + rows_k[None, :]
    mask = inside[:, None] & (rows_k < K)[None, :]
    tl.store(dq + places, dqueries.to(dq.dtype.element_ty), mask=mask)
    tl.store(dk + places, dkeys.to(dk.dtype.element_ty), mask=mask)


@triton.jit
def value_gradients(
    q, k, do, g, dstates, dv, start, end, scale, H, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, HAS_G: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of V, H, chunks."""
    columns_v = tl.program_id(0) * BV + tl.arange(0, BV)
    h, m = tl.program_id(1), tl.program_id(2)
    tokens = tl.load(start + m).to(tl.int64) + tl.arange(0, C)
    inside = tokens < tl.load(end + m)
    scores_transposed = tl.zeros([C, C], dtype=tl.float32)
    dvalues = tl.zeros([C, BV], dtype=tl.float32)
    for i in range(tl.cdiv(K, BK)):
        rows_k = i * BK + tl.arange(0, BK)
        keys = _rows(k, tokens, inside, h, H, K, rows_k)
        queries = _rows_transposed(q, tokens, inside, h, H, K, rows_k)
        offsets, mask = _state_offsets((m * H + h).to(tl.int64), rows_k, columns_v, K, V)
        dstate = tl.load(dstates + offsets, mask=mask, other=0.0).to(keys.dtype)
        scores_transposed += tl.dot(keys, queries, input_precision=PRECISION)
        dvalues += tl.dot(keys, dstate, input_precision=PRECISION)
    c, n, total, resets = _log_decays(g, tokens, inside, h, H, HAS_G)
    dvalues *= _until_end(c, n, total, resets)[:, None]
    scores_transposed *= scale * _between(c, n, C, True)
    douts = _rows(do, tokens, inside, h, H, V, columns_v)
    dvalues += tl.dot(scores_transposed.to(douts.dtype), douts, input_precision=PRECISION)
    mask = inside[:, None] & (columns_v < V)[None, :]
    tl.store(dv + (tokens[:, None] * H + h) * V + columns_v[None, :], dvalues.to(dv.dtype.element_ty), mask=mask)


@triton.jit
def decay_gradients(
    q, k, v, do, g, states, dstates, dg, start, end, scale, H, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: H, chunks."""
    h, m = tl.program_id(0), tl.program_id(1)
    tokens = tl.load(start + m).to(tl.int64) + tl.arange(0, C)
    inside = tokens < tl.load(end + m)
    scores = tl.zeros([C, C], dtype=tl.float32)
    for i in range(tl.cdiv(K, BK)):
        rows_k = i * BK + tl.arange(0, BK)
        queries = _rows(q, tokens, inside, h, H, K, rows_k)
        keys = _rows_transposed(k, tokens, inside, h, H, K, rows_k)
        scores += tl.dot(queries, keys, input_precision=PRECISION)
    dscores = tl.zeros([C, C], dtype=tl.float32)
    read = tl.zeros([C], dtype=tl.float32)
    written = tl.zeros([C], dtype=tl.float32)
    passed = 0.0
    for j in range(tl.cdiv(V, BV)):
        columns_v = j * BV + tl.arange(0, BV)
        values = _rows(v, tokens, inside, h, H, V, columns_v)
        douts = _rows(do, tokens, inside, h, H, V, columns_v)
        dscores += tl.dot(douts, _rows_transposed(v, tokens, inside, h, H, V, columns_v), input_precision=PRECISION)
        from_state = tl.zeros([C, BV], dtype=tl.float32)
        to_state = tl.zeros([C, BV], dtype=tl.float32)
        for i in range(tl.cdiv(K, BK)):
            rows_k = i * BK + tl.arange(0, BK)
            queries = _rows(q, tokens, inside, h, H, K, rows_k)
            keys = _rows(k, tokens, inside, h, H, K, rows_k)
            offsets, mask = _state_offsets((m * H + h).to(tl.int64), rows_k, columns_v, K, V)
            state = tl.load(states + offsets, mask=mask, other=0.0)
            dstate = tl.load(dstates + offsets, mask=mask, other=0.0)
            from_state += tl.dot(queries, state.to(queries.dtype), input_precision=PRECISION)
            to_state += tl.dot(keys, dstate.to(keys.dtype), input_precision=PRECISION)
            passed += tl.sum(tl.sum(state * dstate, 1), 0)
        read += tl.sum(from_state * douts, 1)
        written += tl.sum(to_state * values, 1)
    c, n, total, resets = _log_decays(g, tokens, inside, h, H, True)
    read *= scale * _since_start(c, n)
    written *= _until_end(c, n, total, resets)
    place = tl.arange(0, C)
    later = place[:, None] <= place[None, :]  # [j, t]
    earlier = place[:, None] > place[None, :]  # [j, s]
    pairs = tl.cumsum(scores * dscores * scale * _between(c, n, C, False), 0, reverse=True)  # [j, s], all t >= j
    gradient = tl.sum(tl.where(earlier, pairs + written[None, :], 0.0), 1)
    gradient += tl.sum(tl.where(later, read[None, :], 0.0), 1)
    gradient += passed * _since_start(total, resets)
    tl.store(dg + tokens * H + h, gradient, mask=inside)
