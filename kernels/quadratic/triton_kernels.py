"""Triton kernels of quadratic attention: what tokens read of their stretch directly, and of what is before it by state.

A tile is a chunk of 64 tokens of one document, and so is every step of a loop. Three kernels do both directions:

    written     sum over tokens of phi(w_t) u_t^T: what a stretch leaves, and the states that documents leave
    outputs     y_t = sum over partners p of f(x_t . w_p) u_p + phi(x_t)^T E      o of (q, k, v), dv of (k, q, do)
    gradients   dx_t = sum over p of f'(x_t . w_p) (a_t . u_p) w_p + J(x_t)^T E a_t
                dq of (q, k) under (a, u) = (do, v), dk of (k, q) under (v, do)

Partners are tokens of the document and stretch: those before and the token itself, or, REVERSE, after. E [F, V] is the
state that comes into the stretch from that side, S or the gradient of S. With NORMALIZE a state has one more column:
the sum of phi(k), and on the way back that of phi(q) times the gradient of the denominator. With r = 1 / (denominator +
eps) and delta_t = do_t . o_t the gradient of the numerator is r do, that of the denominator -r delta.

Features are made of a tile by two products with matrices of zeros and ones, which pick the left and the right channel
of each pair, exactly: phi(x) = weight * (x P) * (x Q). Their transpose is made transposed, (P^T x^T) * (Q^T x^T), and
so are scores: no product of a product is transposed, which Triton 3.4 to 3.7.0 miscompiles on Hopper GPUs
(https://github.com/fla-org/flash-linear-attention/issues/640).

x, w: [T, H, K] and u, a: [T, H, V], strides of tokens and heads as given; y: [T, H, V]; r, delta: [T, H]; states:
[stretches, H, F, PITCH], initial and final ones [N, H, F, V or V + 1]; a row of either is `pitch` numbers long.
"""

# pyright: basic, reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from torchlinearmoe.kernels.linear.walk_kernels import rows_of


@triton.jit
def feature_places(block, scale, K: tl.constexpr, F: tl.constexpr, TAYLOR: tl.constexpr, BF: tl.constexpr):
    """Left and right channel of the features `block` * BF and on in [x, 1], and their weights; 0 beyond F.

    Pairs p are listed by rows, row i from i (2 K + 1 - i) / 2 on:    K = 3    left 0 0 0 1 1 2    right 0 1 2 1 2 2
    """
    feature = block * BF + tl.arange(0, BF)
    FIRST: tl.constexpr = K + 1 if TAYLOR else 0
    SIDE: tl.constexpr = 2 * K + 1
    pair = tl.minimum(tl.maximum(feature - FIRST, 0), K * (K + 1) // 2 - 1)
    left = ((SIDE - tl.sqrt((SIDE * SIDE - 8 * pair).to(tl.float32))) / 2).to(tl.int32)
    # The root is rounded: it may be one off.
    left = tl.where(left * (SIDE - left) // 2 > pair, left - 1, left)
    left = tl.where((left + 1) * (SIDE - left - 1) // 2 <= pair, left + 1, left)
    right = pair - left * (SIDE - left) // 2 + left
    if TAYLOR:
        weight = tl.where(left == right, scale * 0.7071067811865476, scale)
        weight = tl.where(feature < FIRST, tl.where(feature == 0, 1.0, tl.sqrt(scale)), weight)
        left = tl.where(feature < FIRST, tl.where(feature == 0, K, feature - 1), left)
        right = tl.where(feature < FIRST, K, right)
    else:
        weight = tl.where(left == right, scale, scale * 1.4142135623730951)
    return left, right, tl.where(feature < F, weight, 0.0)


@triton.jit
def picked(x, channel, K: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """Channels [BF] of [x, 1] in float32: [C, BF]; beyond K, x is zero."""
    one_hot = (tl.arange(0, BK)[:, None] == channel[None, :]).to(x.dtype)
    return tl.dot(x, one_hot, input_precision=PRECISION) + tl.where(channel == K, 1.0, 0.0)[None, :]


@triton.jit
def picked_rows(x, channel, K: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """The same, [BF, C]."""
    one_hot = (channel[:, None] == tl.arange(0, BK)[None, :]).to(x.dtype)
    return tl.dot(one_hot, tl.trans(x), input_precision=PRECISION) + tl.where(channel == K, 1.0, 0.0)[:, None]


@triton.jit
def put_back(g, channel, dtype: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """The gradient of `picked`, [C, BK]."""
    one_hot = (channel[:, None] == tl.arange(0, BK)[None, :]).to(dtype)
    return tl.dot(g.to(dtype), one_hot, input_precision=PRECISION)


@triton.jit
def score(s, TAYLOR: tl.constexpr):
    if TAYLOR:
        return 1.0 + s * (1.0 + s * 0.5)
    return s * s


@triton.jit
def slope(s, scale, TAYLOR: tl.constexpr):
    """Of a score by the product of query and key; s is the product times `scale`."""
    if TAYLOR:
        return scale * (1.0 + s)
    return 2.0 * scale * s


@triton.jit
def tokens_of(start, end, m, C: tl.constexpr):
    """Of chunk m, and which of them there are."""
    tokens = tl.load(start + m) + tl.arange(0, C)
    return tokens, tokens < tl.load(end + m)


@triton.jit
def row_places(row, wanted, h, H, pitch, block, F: tl.constexpr, BF: tl.constexpr):
    """Where the rows of a block of features of the state at `row` begin, and which of them there are: [BF]; none unless
    it is wanted."""
    features = block * BF + tl.arange(0, BF)
    return ((row.to(tl.int64) * H + h) * F + features) * pitch, features < tl.where(wanted, F, 0)


@triton.jit
def state_block(states, row, wanted, h, H, V, pitch, block, columns, F: tl.constexpr, BF: tl.constexpr):
    """[BF, BV] of the state at `row`."""
    rows, there = row_places(row, wanted, h, H, pitch, block, F, BF)
    mask = there[:, None] & (columns < V)[None, :]
    return tl.load(states + rows[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def last_column(states, row, wanted, h, H, V, pitch, block, F: tl.constexpr, BF: tl.constexpr):
    """Column V of a block of features of the state at `row`: [BF]."""
    rows, there = row_places(row, wanted, h, H, pitch, block, F, BF)
    return tl.load(states + rows + V, mask=there, other=0.0)


@triton.jit
def written(
    w, u, r, delta, states, given, sums, start, end, segment, first, N, scale,
    w_t, w_h, u_t, u_h, H, V, pitch, given_pitch, sums_pitch,
    K: tl.constexpr, F: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr,
    BV: tl.constexpr, TAYLOR: tl.constexpr, NORMALIZE: tl.constexpr, REVERSE: tl.constexpr, DOCUMENTS: tl.constexpr,
    HAS_STATES: tl.constexpr, HAS_GIVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What stretches leave of the document that goes on, or, DOCUMENTS, the states that documents leave, from what
    comes into the stretch that they end in. given: what comes into documents.

    Grid: stretches or N, H, blocks of F times tiles of V.
    """
    p, h = tl.program_id(0), tl.program_id(1)
    tiles = tl.cdiv(V, BV)
    block = tl.program_id(2) // tiles
    columns = (tl.program_id(2) % tiles) * BV + tl.arange(0, BV)
    channels = tl.arange(0, BK)
    left, right, weight = feature_places(block, scale, K, F, TAYLOR, BF)
    total = tl.zeros([BF, BV], dtype=tl.float32)
    extra = tl.zeros([BF], dtype=tl.float32)
    if DOCUMENTS:
        low = tl.load(first + p)
        high = tl.load(first + p + 1)
        if REVERSE:
            s = low // GROUP
            carried = high > (s + 1) * GROUP
            high = tl.minimum(high, (s + 1) * GROUP)
        else:
            s = tl.maximum(high - 1, 0) // GROUP
            carried = low < s * GROUP
            low = tl.maximum(low, s * GROUP)
        if HAS_STATES:
            total += state_block(states, s, carried, h, H, V, pitch, block, columns, F, BF)
            if NORMALIZE:
                extra += last_column(states, s, carried, h, H, V, pitch, block, F, BF)
        if HAS_GIVEN:
            begins = tl.where(carried, 0, 1) > 0
            total += state_block(given, p, begins, h, H, V, given_pitch, block, columns, F, BF)
            if NORMALIZE:
                extra += last_column(given, p, begins, h, H, V, given_pitch, block, F, BF)
    else:
        if REVERSE:
            low = p * GROUP
            high = tl.minimum(low + GROUP, tl.load(first + tl.load(segment + low) + 1))
        else:
            high = tl.minimum((p + 1) * GROUP, tl.load(first + N))
            low = tl.maximum(p * GROUP, tl.load(first + tl.load(segment + tl.maximum(high - 1, 0))))
    for m in range(low, high):
        tokens, inside = tokens_of(start, end, m, C)
        tokens = tokens.to(tl.int64)
        ws = rows_of(w, tokens, inside, w_t, w_h, h, K, channels)
        us = rows_of(u, tokens, inside, u_t, u_h, h, V, columns)
        features = picked_rows(ws, left, K, BK, PRECISION) * picked_rows(ws, right, K, BK, PRECISION)
        features *= weight[:, None]
        if NORMALIZE:
            if REVERSE:
                features *= tl.load(r + tokens * H + h, mask=inside, other=0.0)[None, :]
                extra -= tl.sum(features * tl.load(delta + tokens * H + h, mask=inside, other=0.0)[None, :], 1)
            else:
                extra += tl.sum(tl.where(inside[None, :], features, 0.0), 1)
        total += tl.dot(features.to(us.dtype), us, input_precision=PRECISION)
    rows, there = row_places(p, True, h, H, sums_pitch, block, F, BF)
    tl.store(sums + rows[:, None] + columns[None, :], total, mask=there[:, None] & (columns < V)[None, :])
    if NORMALIZE:
        features = block * BF + tl.arange(0, BF)
        tl.store(sums + rows + V, extra, mask=features < tl.where(tl.program_id(2) % tiles == 0, F, 0))


@triton.jit
def _left(
    states, given, s, S, n, carried, h, H, elements, pitch, given_pitch, F: tl.constexpr, HAS_GIVEN: tl.constexpr
):  # fmt: skip
    """Where a stretch's state lies, which elements there are, what the stretch adds, and what begins in it."""
    features, column = elements // pitch, elements % pitch
    there = (features < tl.where((s >= 0) & (s < S), F, 0)) & (column < given_pitch)
    places = states + (s.to(tl.int64) * H + h) * F * pitch + elements
    summary = tl.load(places, mask=there, other=0.0)
    if HAS_GIVEN:
        begins = there & (column < tl.where(carried, 0, given_pitch))
        row = given + (n.to(tl.int64) * H + h) * F * given_pitch
        summary += tl.load(row + features * given_pitch + column, mask=begins, other=0.0)
    return places, there, summary


@triton.jit
def _border(s, S, segment, first, N, GROUP: tl.constexpr, REVERSE: tl.constexpr):
    """The document that leaves stretch s, and whether it came into it."""
    s = tl.minimum(tl.maximum(s, 0), S - 1)
    if REVERSE:
        n = tl.load(segment + s * GROUP)
        carried = tl.load(first + n + 1) > (s + 1) * GROUP
    else:
        high = tl.minimum((s + 1) * GROUP, tl.load(first + N))
        n = tl.load(segment + tl.maximum(high - 1, 0))
        carried = tl.load(first + n) < s * GROUP
    return n, carried


@triton.jit
def join(
    states, given, segment, first, N, S, H, pitch, given_pitch,
    F: tl.constexpr, GROUP: tl.constexpr, B: tl.constexpr, REVERSE: tl.constexpr, HAS_GIVEN: tl.constexpr,
):  # fmt: skip
    """What S stretches leave becomes what comes into each, in place. Grid: tiles of a state, H.

    Four at a time, so that loads do not wait for each other.
    """
    elements = tl.program_id(0) * B + tl.arange(0, B)
    h = tl.program_id(1)
    state = tl.zeros([B], dtype=tl.float32)
    for i in range(0, S, 4):
        a = S - 1 - i if REVERSE else i
        step = -1 if REVERSE else 1
        b, c, d = a + step, a + 2 * step, a + 3 * step
        n_a, goes_a = _border(a, S, segment, first, N, GROUP, REVERSE)
        n_b, goes_b = _border(b, S, segment, first, N, GROUP, REVERSE)
        n_c, goes_c = _border(c, S, segment, first, N, GROUP, REVERSE)
        n_d, goes_d = _border(d, S, segment, first, N, GROUP, REVERSE)
        at_a, is_a, left_a = _left(states, given, a, S, n_a, goes_a, h, H, elements, pitch, given_pitch, F, HAS_GIVEN)
        at_b, is_b, left_b = _left(states, given, b, S, n_b, goes_b, h, H, elements, pitch, given_pitch, F, HAS_GIVEN)
        at_c, is_c, left_c = _left(states, given, c, S, n_c, goes_c, h, H, elements, pitch, given_pitch, F, HAS_GIVEN)
        at_d, is_d, left_d = _left(states, given, d, S, n_d, goes_d, h, H, elements, pitch, given_pitch, F, HAS_GIVEN)
        tl.store(at_a, state, mask=is_a)
        state = left_a + tl.where(goes_a, state, 0.0)
        tl.store(at_b, state, mask=is_b)
        state = left_b + tl.where(goes_b, state, 0.0)
        tl.store(at_c, state, mask=is_c)
        state = left_c + tl.where(goes_c, state, 0.0)
        tl.store(at_d, state, mask=is_d)
        state = left_d + tl.where(goes_d, state, 0.0)


@triton.jit
def reach(m, segment, first, N, GROUP: tl.constexpr, REVERSE: tl.constexpr):
    """The document n of chunk m, its stretch s, the chunks of its partners, from low to high, none for a place without
    a chunk, and whether the document comes into the stretch."""
    n = tl.load(segment + m)
    s = m // GROUP
    if REVERSE:
        low = m
        high = tl.load(first + n + 1)
        carried = high > (s + 1) * GROUP
        high = tl.minimum(high, (s + 1) * GROUP)
    else:
        low = tl.load(first + n)
        carried = low < s * GROUP
        low = tl.maximum(low, s * GROUP)
        high = m + 1
    return n, s, low, tl.where(m < tl.load(first + N), high, low), carried


@triton.jit
def seen(own, tokens, inside, REVERSE: tl.constexpr):
    """[C, C]: which partners, the columns, are on the right side of each token."""
    if REVERSE:
        return (tokens[None, :] >= own[:, None]) & inside[None, :]
    return (tokens[None, :] <= own[:, None]) & inside[None, :]


@triton.jit
def _read(
    out, den, xs, states, row, blocks, h, H, V, pitch, columns, scale,
    K: tl.constexpr, F: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr, TAYLOR: tl.constexpr,
    DENOMINATOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`out` and `den` with what tokens read of the first `blocks` of the state at `row`."""
    for block in range(blocks):
        left, right, weight = feature_places(block, scale, K, F, TAYLOR, BF)
        features = picked(xs, left, K, BK, PRECISION) * picked(xs, right, K, BK, PRECISION) * weight[None, :]
        state = state_block(states, row, True, h, H, V, pitch, block, columns, F, BF)
        out += tl.dot(features.to(xs.dtype), state.to(xs.dtype), input_precision=PRECISION)
        if DENOMINATOR:
            den += tl.sum(features * last_column(states, row, True, h, H, V, pitch, block, F, BF)[None, :], 1)
    return out, den


@triton.jit
def outputs(
    x, w, u, r, states, given, y, start, end, segment, first, N, scale, eps,
    x_t, x_h, w_t, w_h, u_t, u_h, H, V, pitch, given_pitch,
    K: tl.constexpr, F: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr,
    BV: tl.constexpr, TAYLOR: tl.constexpr, NORMALIZE: tl.constexpr, REVERSE: tl.constexpr,
    HAS_STATES: tl.constexpr, HAS_GIVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [T, H, V]. With NORMALIZE they are divided, and r is written; REVERSE, partners count r times.

    Grid: places for chunks, H, tiles of V.
    """
    m, h = tl.program_id(0), tl.program_id(1)
    columns = tl.program_id(2) * BV + tl.arange(0, BV)
    channels = tl.arange(0, BK)
    n, s, low, high, carried = reach(m, segment, first, N, GROUP, REVERSE)
    own, there = tokens_of(start, end, m, C)
    xs = rows_of(x, own.to(tl.int64), there, x_t, x_h, h, K, channels)
    out = tl.zeros([C, BV], dtype=tl.float32)
    den = tl.zeros([C], dtype=tl.float32)
    BLOCKS: tl.constexpr = (F + BF - 1) // BF
    DIVIDE: tl.constexpr = NORMALIZE and not REVERSE
    if HAS_STATES:
        out, den = _read(
            out, den, xs, states, s, tl.where(carried & (high > low), BLOCKS, 0), h, H, V, pitch, columns, scale,
            K, F, BK, BF, TAYLOR, DIVIDE, PRECISION,
        )  # fmt: skip
    if HAS_GIVEN:
        out, den = _read(
            out, den, xs, given, n, tl.where(carried | (high <= low), 0, BLOCKS), h, H, V, given_pitch, columns, scale,
            K, F, BK, BF, TAYLOR, DIVIDE, PRECISION,
        )  # fmt: skip
    for j in range(low, high):
        tokens, inside = tokens_of(start, end, j, C)
        wide = tokens.to(tl.int64)
        ws = rows_of(w, wide, inside, w_t, w_h, h, K, channels)
        us = rows_of(u, wide, inside, u_t, u_h, h, V, columns)
        scores = score(scale * tl.dot(xs, tl.trans(ws), input_precision=PRECISION), TAYLOR)
        scores = tl.where(seen(own, tokens, inside, REVERSE), scores, 0.0)
        if NORMALIZE:
            if REVERSE:
                scores *= tl.load(r + wide * H + h, mask=inside, other=0.0)[None, :]
            else:
                den += tl.sum(scores, 1)
        out += tl.dot(scores.to(us.dtype), us, input_precision=PRECISION)
    own = own.to(tl.int64)
    if DIVIDE:
        inverse = 1.0 / (den + eps)
        out *= inverse[:, None]
        tl.store(r + own * H + h, inverse, mask=own < tl.where(tl.program_id(2) == 0, tl.load(end + m), 0))
    mask = there[:, None] & (columns < V)[None, :]
    tl.store(y + (own[:, None] * H + h) * V + columns[None, :], out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def products_of_outputs(a, o, delta, T, a_t, a_h, H, V, C: tl.constexpr, BV: tl.constexpr):
    """delta_t = do_t . o_t, [T, H]; o is contiguous. Grid: tiles of T, H."""
    h = tl.program_id(1)
    tokens = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    total = tl.zeros([C], dtype=tl.float32)
    for part in range(tl.cdiv(V, BV)):
        columns = part * BV + tl.arange(0, BV)
        left = rows_of(a, tokens, tokens < T, a_t, a_h, h, V, columns).to(tl.float32)
        right = rows_of(o, tokens, tokens < T, H * V, V, h, V, columns).to(tl.float32)
        total += tl.sum(left * right, 1)
    tl.store(delta + tokens * H + h, total, mask=tokens < T)


@triton.jit
def _through_features(
    dx, xs, a, own, there, inverse, change, states, row, blocks, h, H, V, pitch, scale, a_t, a_h,
    K: tl.constexpr, F: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr,
    C: tl.constexpr, TAYLOR: tl.constexpr, NORMALIZE: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dx` with what comes of the first `blocks` of the state at `row`."""
    for block in range(blocks):
        left, right, weight = feature_places(block, scale, K, F, TAYLOR, BF)
        change_of = tl.zeros([C, BF], dtype=tl.float32)
        for part in range(PARTS):
            columns = part * BV + tl.arange(0, BV)
            mine = rows_of(a, own, there, a_t, a_h, h, V, columns)
            state = state_block(states, row, True, h, H, V, pitch, block, columns, F, BF).to(xs.dtype)
            change_of += tl.dot(mine, tl.trans(state), input_precision=PRECISION)
        if NORMALIZE:
            column = last_column(states, row, True, h, H, V, pitch, block, F, BF)
            if REVERSE:
                change_of += column[None, :]
            else:
                change_of = (change_of - change[:, None] * column[None, :]) * inverse[:, None]
        change_of *= weight[None, :]
        through = change_of * picked(xs, right, K, BK, PRECISION)
        dx += put_back(through, left, xs.dtype, BK, PRECISION)
        through = change_of * picked(xs, left, K, BK, PRECISION)
        dx += put_back(through, right, xs.dtype, BK, PRECISION)
    return dx


@triton.jit
def gradients(
    x, w, a, u, r, delta, states, given, dx, start, end, segment, first, N, scale,
    x_t, x_h, w_t, w_h, a_t, a_h, u_t, u_h, H, V, pitch, given_pitch,
    K: tl.constexpr, F: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr,
    BV: tl.constexpr, PARTS: tl.constexpr, TAYLOR: tl.constexpr, NORMALIZE: tl.constexpr, REVERSE: tl.constexpr,
    HAS_STATES: tl.constexpr, HAS_GIVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx [T, H, K]; PARTS of BV channels are V. Grid: places for chunks, H."""
    m, h = tl.program_id(0), tl.program_id(1)
    channels = tl.arange(0, BK)
    n, s, low, high, carried = reach(m, segment, first, N, GROUP, REVERSE)
    own, there = tokens_of(start, end, m, C)
    wide_own = own.to(tl.int64)
    xs = rows_of(x, wide_own, there, x_t, x_h, h, K, channels)
    dx_of = tl.zeros([C, BK], dtype=tl.float32)
    inverse = tl.zeros([C], dtype=tl.float32)
    change = tl.zeros([C], dtype=tl.float32)
    if NORMALIZE and not REVERSE:
        inverse += tl.load(r + wide_own * H + h, mask=there, other=0.0)
        change += tl.load(delta + wide_own * H + h, mask=there, other=0.0)
    BLOCKS: tl.constexpr = (F + BF - 1) // BF
    if HAS_STATES:
        dx_of = _through_features(
            dx_of, xs, a, wide_own, there, inverse, change, states, s, tl.where(carried & (high > low), BLOCKS, 0),
            h, H, V, pitch, scale, a_t, a_h, K, F, BK, BF, BV, PARTS, C, TAYLOR, NORMALIZE, REVERSE, PRECISION,
        )  # fmt: skip
    if HAS_GIVEN:
        dx_of = _through_features(
            dx_of, xs, a, wide_own, there, inverse, change, given, n, tl.where(carried | (high <= low), 0, BLOCKS),
            h, H, V, given_pitch, scale, a_t, a_h, K, F, BK, BF, BV, PARTS, C, TAYLOR, NORMALIZE, REVERSE, PRECISION,
        )  # fmt: skip
    for j in range(low, high):
        tokens, inside = tokens_of(start, end, j, C)
        wide = tokens.to(tl.int64)
        ws = rows_of(w, wide, inside, w_t, w_h, h, K, channels)
        products = scale * tl.dot(xs, tl.trans(ws), input_precision=PRECISION)
        change_of = tl.zeros([C, C], dtype=tl.float32)
        for part in range(PARTS):
            columns = part * BV + tl.arange(0, BV)
            mine = rows_of(a, wide_own, there, a_t, a_h, h, V, columns)
            theirs = rows_of(u, wide, inside, u_t, u_h, h, V, columns)
            change_of += tl.dot(mine, tl.trans(theirs), input_precision=PRECISION)
        if NORMALIZE:
            if REVERSE:
                change_of -= tl.load(delta + wide * H + h, mask=inside, other=0.0)[None, :]
                change_of *= tl.load(r + wide * H + h, mask=inside, other=0.0)[None, :]
            else:
                change_of = (change_of - change[:, None]) * inverse[:, None]
        change_of = tl.where(seen(own, tokens, inside, REVERSE), change_of * slope(products, scale, TAYLOR), 0.0)
        dx_of += tl.dot(change_of.to(ws.dtype), ws, input_precision=PRECISION)
    mask = there[:, None] & (channels < K)[None, :]
    tl.store(dx + (wide_own[:, None] * H + h) * K + channels[None, :], dx_of.to(dx.dtype.element_ty), mask=mask)
