"""Triton kernels that walk the delta rule chunk by chunk, many stretches of chunks at once.

With W, U and P of `solve_kernels`, E the state [K, V] that enters a chunk, a = e^{c_C} what is left of it at the end,
q_in = scale q e^c and k_out = k e^{c_C - c}:

    x  = U - W E                       what tokens write
    y  = q_in E + P x                  E' = a E + k_out^T x

and from the last chunk to the first, R the gradient of the state that leaves it and z that of x,

    z  = P^T dy + k_out R              R' = a R + q_in^T dy - W^T z

which is all that gradients need beside x, E and R (`gradient_kernels`).

A stretch is GROUP chunks of the whole stream. As a function of what enters, what leaves it is M E + B; `onward` and
`back` with SUMMARY give B, and M by K columns more, which begin as the identity; `join` folds them; the way back goes
by M^T. So a long document fills the chip. A stretch in which a document begins passes nothing on.

DECAY: 0 none; 1 one per token and head, as `measure` of linear/walk_kernels.py makes it: q, k as they are, and rows of
products take the factors; 2 one per channel: q_in, k_out and a as `solve_kernels.prepare_channels` makes them.

States and their gradients of every chunk, as products read them: [M, HV, K, V], type of the inputs. No product of a
product is transposed, which Triton 3.4 to 3.7.0 miscompiles on Hopper GPUs
(https://github.com/fla-org/flash-linear-attention/issues/640).
"""

# pyright: basic, reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false

import triton
import triton.language as tl

from torchlinearmoe.kernels.delta.solve_kernels import pairs_of, rows_of
from torchlinearmoe.kernels.linear.walk_kernels import (
    measured_of,
    passed_over,
    state_of,
    state_places,
)


@triton.jit(do_not_specialize=["N", "T", "H"])
def onward(
    q, k, erasing, writing, decays, totals, scores, entered, enter, leave, y, writes, states, transitions,
    start, end, segment, first, N, scale, q_t, q_h, k_t, k_h, T, H, K, V,
    G: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr,
    HAS_ENTERED: tl.constexpr, HAS_ENTER: tl.constexpr, WANT_LEAVE: tl.constexpr,
    WANT_Y: tl.constexpr, WANT_WRITES: tl.constexpr, SUMMARY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [T, HV, V], or x and the states of all chunks, or the summaries of stretches. Grid: tiles of V, HV, stretches.

    SUMMARY: B goes to entered [stretches, HV, K, V], M to transitions [stretches, HV, K, K], by tiles of K after those
    of V. erasing, writing: W, U; of DECAY 2, q and k are q_in and k_out. enter, leave: states of documents that enter
    and leave, [N, HV, K, V]. H: HV.
    """
    tile, h, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tl.arange(0, BK)
    place = tl.arange(0, C)
    lowest = s * GROUP
    highest = tl.minimum(lowest + GROUP, tl.load(first + N))
    state = tl.zeros([BK, BV], dtype=tl.float32)
    width = V
    if SUMMARY:
        tiles = tl.cdiv(V, BV)
        width = tl.where(tile < tiles, V, 0)
        columns = tl.where(tile < tiles, tile, tile - tiles) * BV + tl.arange(0, BV)
        state += tl.where((rows[:, None] == columns[None, :]) & (tile >= tiles), 1.0, 0.0)
    else:
        columns = tile * BV + tl.arange(0, BV)
    if HAS_ENTERED:
        places, mask = state_places(s, True, h, H, K, V, rows, columns, False)
        state += tl.load(entered + places, mask=mask, other=0.0)
    for i in range(highest - lowest):
        m = lowest + i
        n = tl.load(segment + m)
        begins = m == tl.load(first + n)
        if HAS_ENTER:
            if begins:  # a load that a loop would make ahead takes shared memory
                places, mask = state_places(n, True, h, H, K, V, rows, columns, False)
                state = tl.load(enter + places, mask=mask & (columns < width)[None, :], other=0.0)
        else:
            state = tl.where(begins, 0.0, state)
        token = tl.load(start + m).to(tl.int64)
        tokens = token + place
        inside = tokens < tl.load(end + m)
        if DECAY == 1:  # asked for before products, which wait
            left, to_end = tl.load(totals + m * H + h), measured_of(decays, 3, tokens, inside, h, H, T)
            if WANT_Y:
                from_start = measured_of(decays, 2, tokens, inside, h, H, T) * scale
        if DECAY == 2:
            remains = passed_over(totals, m, h, H, K, rows)
        erased = rows_of(erasing, token, place, inside, H * K, K, h, K, rows)
        written = rows_of(writing, token, place, inside, H * V, V, h, width, columns)
        low = state.to(erased.dtype)
        written = (written - tl.dot(erased, low, input_precision=PRECISION)).to(erased.dtype)
        there = inside[:, None] & (columns < V)[None, :]
        if WANT_Y:
            qs = rows_of(q, token, place, inside, q_t, q_h, h // G, K, rows)
            out = tl.dot(qs, low, input_precision=PRECISION)
            if DECAY == 1:
                out *= from_start[:, None]
            if DECAY == 0:
                out *= scale
            near = pairs_of(scores, token, inside, h, H, place, C, False)
            out += tl.dot(near, written, input_precision=PRECISION)
            tl.store(
                y + (token * H + h) * V + (place[:, None] * (H * V) + columns[None, :]),
                out.to(y.dtype.element_ty),
                mask=there,
            )
        if WANT_WRITES:
            tl.store(writes + (token * H + h) * V + (place[:, None] * (H * V) + columns[None, :]), written, mask=there)
            places, mask = state_places(m, True, h, H, K, V, rows, columns, False)
            tl.store(states + places, low, mask=mask)
        ks = rows_of(k, token, place, inside, k_t, k_h, h // G, K, rows)
        if DECAY == 1:
            written = (written * to_end[:, None]).to(ks.dtype)
            state = state * left
        if DECAY == 2:
            state = state * remains[:, None]
        state += tl.dot(tl.trans(ks), written, input_precision=PRECISION)
        if WANT_LEAVE:
            ends = m + 1 == tl.load(first + n + 1)
            places, mask = state_places(n, ends, h, H, K, V, rows, columns, False)
            tl.store(leave + places, state, mask=mask)
    if SUMMARY:
        places, mask = state_places(s, True, h, H, K, V, rows, columns, False)
        tl.store(entered + places, state, mask=mask & (columns < width)[None, :])
        places, mask = state_places(s, True, h, H, K, K, rows, columns, False)
        tl.store(transitions + places, state, mask=mask & (columns < tl.where(width == 0, K, 0))[None, :])


@triton.jit(do_not_specialize=["N", "T", "H"])
def back(
    q, k, erasing, dy, decays, totals, scores, entered, enter, leave, dwrites, states,
    start, end, segment, first, N, scale, q_t, q_h, k_t, k_h, y_t, y_h, T, H, K, V,
    G: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr,
    HAS_ENTERED: tl.constexpr, HAS_ENTER: tl.constexpr, WANT_LEAVE: tl.constexpr,
    SUMMARY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z [T, HV, V] and the gradients of all chunks' states, or B of stretches, walked from the right.

    enter, leave: gradients of the states that leave documents, and of those that enter them. Grid: as `onward`.
    """
    tile, h, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tl.arange(0, BK)
    columns = tile * BV + tl.arange(0, BV)
    place = tl.arange(0, C)
    lowest = s * GROUP
    highest = tl.minimum(lowest + GROUP, tl.load(first + N))
    state = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_ENTERED:
        places, mask = state_places(s, True, h, H, K, V, rows, columns, False)
        state += tl.load(entered + places, mask=mask, other=0.0)
    for i in range(highest - lowest):
        m = highest - 1 - i
        n = tl.load(segment + m)
        ends = m + 1 == tl.load(first + n + 1)
        if HAS_ENTER:
            if ends:
                places, mask = state_places(n, True, h, H, K, V, rows, columns, False)
                state = tl.load(enter + places, mask=mask, other=0.0)
        else:
            state = tl.where(ends, 0.0, state)
        token = tl.load(start + m).to(tl.int64)
        tokens = token + place
        inside = tokens < tl.load(end + m)
        if DECAY == 1:
            left, to_end = tl.load(totals + m * H + h), measured_of(decays, 3, tokens, inside, h, H, T)
            from_start = measured_of(decays, 2, tokens, inside, h, H, T) * scale
        if DECAY == 2:
            remains = passed_over(totals, m, h, H, K, rows)
        ks = rows_of(k, token, place, inside, k_t, k_h, h // G, K, rows)
        dys = rows_of(dy, token, place, inside, y_t, y_h, h, V, columns)
        low = state.to(ks.dtype)
        if not SUMMARY:
            places, mask = state_places(m, True, h, H, K, V, rows, columns, False)
            tl.store(states + places, low, mask=mask)
        change = tl.dot(ks, low, input_precision=PRECISION)
        if DECAY == 1:
            change *= to_end[:, None]
        near = pairs_of(scores, token, inside, h, H, place, C, True)
        change = tl.dot(near, dys, change, input_precision=PRECISION).to(dys.dtype)
        if not SUMMARY:
            there = inside[:, None] & (columns < V)[None, :]
            tl.store(dwrites + (token * H + h) * V + (place[:, None] * (H * V) + columns[None, :]), change, mask=there)
        if DECAY == 1:
            dys = (dys * from_start[:, None]).to(ks.dtype)
            state = state * left
        if DECAY == 0:
            dys = (dys * scale).to(ks.dtype)
        if DECAY == 2:
            state = state * remains[:, None]
        qs = rows_of(q, token, place, inside, q_t, q_h, h // G, K, rows)
        erased = rows_of(erasing, token, place, inside, H * K, K, h, K, rows)
        state += tl.dot(tl.trans(qs), dys, input_precision=PRECISION)
        state -= tl.dot(tl.trans(erased), change, input_precision=PRECISION)
        if WANT_LEAVE:
            begins = m == tl.load(first + n)
            places, mask = state_places(n, begins, h, H, K, V, rows, columns, False)
            tl.store(leave + places, state, mask=mask)
    if SUMMARY:
        places, mask = state_places(s, True, h, H, K, V, rows, columns, False)
        tl.store(entered + places, state, mask=mask)


@triton.jit(do_not_specialize=["N", "S", "H"])
def join(
    states, transitions, enter, leave, segment, first, N, S, H, K, V,
    GROUP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, B: tl.constexpr, REVERSE: tl.constexpr,
    HAS_ENTER: tl.constexpr, WANT_LEAVE: tl.constexpr,
):  # fmt: skip
    """B of the S stretches become the states that enter them, in place. Grid: tiles of V, HV.

    M: [S, HV, K, K]; enter, leave: [HV, K, V], at the ends of all stretches. From the right M is transposed, and what
    ends with a stretch hands nothing to it. Of wide keys products read the state where it lies, part by part.
    """
    rows = tl.arange(0, BK)
    columns = tl.program_id(0) * BV + tl.arange(0, BV)
    h = tl.program_id(1)
    chunks = tl.load(first + N)
    state = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_ENTER:
        state += state_of(enter, h * 0, h, H, K, V, rows, columns, False)
    for i in range(S):
        s = tl.program_id(1) * 0 + (S - 1 - i if REVERSE else i)  # a number of the device, interpreted too
        places, mask = state_places(s, True, h, H, K, V, rows, columns, False)
        summary = tl.load(states + places, mask=mask, other=0.0)
        tl.store(states + places, state, mask=mask)
        if B >= BK:
            at, inside = state_places(s, True, h, H, K, K, rows, rows, REVERSE)
            passed = tl.dot(tl.load(transitions + at, mask=inside, other=0.0), state, input_precision="tf32x3")
        else:
            tl.debug_barrier()
            passed = tl.zeros([BK, BV], dtype=tl.float32)
            for j in range(tl.cdiv(K, B)):
                some = j * B + tl.arange(0, B)
                at, inside = state_places(s, True, h, H, K, K, rows, some, REVERSE)
                part = tl.load(transitions + at, mask=inside, other=0.0)
                at_state, in_state = state_places(s, True, h, H, K, V, some, columns, False)
                whole = tl.load(states + at_state, mask=in_state, other=0.0)
                passed += tl.dot(part, whole, input_precision="tf32x3")
        if REVERSE:
            last = tl.minimum(s * GROUP + GROUP, chunks) - 1
            filled = last >= s * GROUP
            n = tl.load(segment + last, mask=filled, other=0)
            ends = filled & (last + 1 == tl.load(first + n + 1))
            passed = tl.where(ends, 0.0, passed)
        state = passed + summary
    if WANT_LEAVE:
        left, inside = state_places(h * 0, True, h, H, K, V, rows, columns, False)
        tl.store(leave + left, state, mask=inside)
