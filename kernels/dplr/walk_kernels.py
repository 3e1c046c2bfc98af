"""Triton kernels that walk DPLR chunk by chunk, many stretches of chunks at once.

    z = near u + w S             S' = e^{c_C} S + b^T z + k^T u

Onward, S is the state that enters a chunk, u = v, and z is what tokens read along a. From the last chunk to the first,
S is the gradient R of the state that leaves it, u = do, and z the gradient r of what they read (`rule.py` says of what
w, b, k and near are made).

A stretch is GROUP chunks of the whole stream, whatever documents they are of. What leaves it is X S + Y of what enters,
X [K, K]: with SUMMARY `walk` gives Y, and X by K columns more that begin as the identity and read no u; `join` folds
them, the way back by X^T, and `walk` starts there. So a long document fills the chip. A stretch in which a document
begins passes nothing on.

Only what was loaded is transposed; no product of a product is, which Triton 3.4 to 3.7.0 miscompiles on Hopper GPUs (https://github.com/fla-org/flash-linear-attention/issues/640).

w, b, k: [T, H, K], contiguous; near: [T, H, C]; totals: e^{c_C}, [M, H, K].
"""

# pyright: basic, reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false

import triton
import triton.language as tl

from torchlinearmoe.kernels.dplr.chunk_kernels import pairs_of, store_rows
from torchlinearmoe.kernels.linear.walk_kernels import passed_over, rows_of, state_of, state_places


@triton.jit
def walk(
    near, w, b, k, u, totals, enter, entered, transitions, leave, states, z, start, end, segment, first, N,
    u_t, u_h, H, K, V,
    GROUP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr,
    SUMMARY: tl.constexpr, HAS_ENTERED: tl.constexpr, HAS_ENTER: tl.constexpr, WANT_LEAVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The states that enter chunks, [M, H, K, V], and z [T, H, V], from the states `entered` [stretches, H, K, V]; with
    SUMMARY Y to `entered`, and of tiles beyond V's X to `transitions`, [stretches, H, K, K].

    enter, leave: [N, H, K, V], states of documents that enter and leave. Grid: tiles of V (and K), H, stretches.
    """
    tile, h, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tl.arange(0, BK)
    lowest = s * GROUP
    highest = tl.minimum(lowest + GROUP, tl.load(first + N))
    state = tl.zeros([BK, BV], dtype=tl.float32)
    there = V
    columns = tile * BV + tl.arange(0, BV)
    if SUMMARY:
        tiles = tl.cdiv(V, BV)
        own = (tile - tiles) * BV + tl.arange(0, BV)
        there = tl.where(tile < tiles, V, 0)  # columns of u and of enter; X has none
        state = tl.where((tile >= tiles) & (rows[:, None] == own[None, :]), 1.0, state)
    elif HAS_ENTERED:
        places, mask = state_places(s, True, h, H, K, V, rows, columns, False)
        state = tl.load(entered + places, mask=mask, other=0.0)
    for i in range(highest - lowest):
        m = highest - 1 - i if REVERSE else lowest + i
        n = tl.load(segment + m)
        begins = m == tl.load(first + n)
        ends = m + 1 == tl.load(first + n + 1)
        enters = ends if REVERSE else begins
        if HAS_ENTER:
            places, mask = state_places(n, enters, h, H, K, V, rows, columns, False)
            mask = mask & (columns < there)[None, :]
            state = tl.where(enters, tl.load(enter + places, mask=mask, other=0.0), state)
        else:
            state = tl.where(enters, 0.0, state)
        tokens = tl.load(start + m).to(tl.int64) + tl.arange(0, C)
        inside = tokens < tl.load(end + m)
        us = rows_of(u, tokens, inside, u_t, u_h, h, there, columns)
        low = state.to(us.dtype)
        if not SUMMARY:
            places, mask = state_places(m, True, h, H, K, V, rows, columns, False)
            tl.store(states + places, low, mask=mask)
        read = tl.dot(rows_of(w, tokens, inside, H * K, K, h, K, rows), low, input_precision=PRECISION)
        read = tl.dot(pairs_of(near, tokens, inside, h, H, C, False), us, read, input_precision=PRECISION)
        if not SUMMARY:
            store_rows(z, read, tokens, inside, h, H, V, columns)
        state = state * passed_over(totals, m, h, H, K, rows)[:, None]
        bs = rows_of(b, tokens, inside, H * K, K, h, K, rows)
        state = tl.dot(tl.trans(bs), read.to(us.dtype), state, input_precision=PRECISION)
        ks = rows_of(k, tokens, inside, H * K, K, h, K, rows)
        state = tl.dot(tl.trans(ks), us, state, input_precision=PRECISION)
        if WANT_LEAVE:
            leaves = begins if REVERSE else ends
            places, mask = state_places(n, leaves, h, H, K, V, rows, columns, False)
            tl.store(leave + places, state, mask=mask)
    if SUMMARY:
        if REVERSE:  # what entered the document is not of the one before
            state = tl.where(lowest == tl.load(first + tl.load(segment + lowest)), 0.0, state)
        if tile < tiles:
            places, mask = state_places(s, True, h, H, K, V, rows, columns, False)
            tl.store(entered + places, state, mask=mask)
        else:
            places, mask = state_places(s, True, h, H, K, K, rows, own, False)
            tl.store(transitions + places, state, mask=mask)


@triton.jit
def join(
    entered, transitions, enter, leave, S, H, K, V, BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr,
    HAS_ENTER: tl.constexpr, WANT_LEAVE: tl.constexpr,
):  # fmt: skip
    """Summaries Y become the states that enter the S stretches, in place. Grid: tiles of V, H.

    enter, leave: [H, K, V], at the ends of all stretches.
    """
    rows = tl.arange(0, BK)
    columns = tl.program_id(0) * BV + tl.arange(0, BV)
    h = tl.program_id(1)
    state = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_ENTER:
        state += state_of(enter, h * 0, h, H, K, V, rows, columns, False)
    for i in range(S):
        s = S - 1 - i if REVERSE else i
        places, mask = state_places(s, True, h, H, K, V, rows, columns, False)
        summary = tl.load(entered + places, mask=mask, other=0.0)
        tl.store(entered + places, state, mask=mask)
        places, mask = state_places(s, True, h, H, K, K, rows, rows, REVERSE)
        state = tl.dot(tl.load(transitions + places, mask=mask, other=0.0), state, summary, input_precision="tf32x3")
    if WANT_LEAVE:
        places, mask = state_places(h * 0, True, h, H, K, V, rows, columns, False)
        tl.store(leave + places, state, mask=mask)
