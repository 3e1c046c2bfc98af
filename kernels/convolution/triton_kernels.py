"""Triton kernels of y_t = act(p_t), p_t = b + sum_k w_k x_{t-k}, over the tokens of one document, k < W.

Backward, with g_t = dy_t act'(p_t) and p made again from x:

    dx_t = sum_k w_k g_{t+k},   dw_k = sum_t g_t x_{t-k},   db = sum_t g_t

A program has a tile of ROWS spans of so many tokens, and B channels. It goes through all spans at once, token by token,
and keeps in registers what the next W - 1 tokens need: the window of inputs before (x_{t-1}, x_{t-2}, ...) and, going
back, the gradients of those inputs so far. So a token is read once, but for the W - 1 on either side of a span:

    read       t0-3 t0-2 t0-1 | t0 t0+1 ... t0+span-1 | +1 +2 +3        W = 4
    p, y, dw                    ^^^^^^^^^^^^^^^^^^^^^                   forward ends here
    g                           ^^^^^^^^^^^^^^^^^^^^^   ^^ ^^ ^^        dx_{t-3} is whole when g_t is there

Most tiles have tokens of one document only, which the first and the last id tell, and look at no others. Elsewhere a
token that begins a document gets a window of zeros, or its state, and hands no gradient back beyond it.

x: [T, D] with rows of any stride; weight: [D, W], tap k in column W - 1 - k; initial: [N, W - 1, D], oldest first.
"""

# Constants of the compiler, tuples that grow and its loops are not what Python takes them for.
# pyright: basic, reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _taps(weight, columns, D, W: tl.constexpr, PADDED: tl.constexpr):
    """w_k for k = 0 .. W - 1, [1, B] each in float32."""
    place = tl.arange(0, PADDED)[None, :]
    mask = (columns < D)[:, None] & (place < W)
    tile = tl.load(weight + columns[:, None] * W + place, mask=mask, other=0.0).to(tl.float32)
    taps = ()
    for k in tl.static_range(W):
        taps = taps + (tl.sum(tl.where(place == W - 1 - k, tile, 0.0), 1)[None, :],)
    return taps


@triton.jit
def _shift(bias, columns, D, HAS_BIAS: tl.constexpr):
    """b, [1, B] in float32."""
    if HAS_BIAS:
        b = tl.load(bias + columns, mask=columns < D, other=0.0).to(tl.float32)
    else:
        b = tl.zeros_like(columns).to(tl.float32)
    return b[None, :]


@triton.jit
def _places(x, t, columns, stride):
    """Of tokens t [ROWS] in a tensor whose tokens are `stride` apart: [ROWS, B]."""
    return x + t.to(tl.int64)[:, None] * stride + columns[None, :]


@triton.jit
def _rows(places, stride, t, i, inside, T, COUNT: tl.constexpr):
    """Tokens t + i, t + i + 1, ..., COUNT of them as they are, [ROWS, B] each; zeros outside of the stream."""
    rows = ()
    for j in tl.static_range(COUNT):
        mask = ((t + (i + j) >= 0) & (t + (i + j) < T))[:, None] & inside
        rows = rows + (tl.load(places + (i + j) * stride, mask=mask, other=0.0),)
    return rows


@triton.jit
def _one_document(ids, first, last, T, HAS_INITIAL: tl.constexpr):
    """Whether tokens first .. last are of one document and no state is read by them."""
    same = tl.load(ids + tl.maximum(first, 0)) == tl.load(ids + tl.minimum(last, T - 1))
    if HAS_INITIAL:
        same = same & (first >= 0)
    return same


@triton.jit
def _enter(window, before, ids, initial, t, columns, inside, T, D, W: tl.constexpr, HAS_INITIAL: tl.constexpr):
    """The window as tokens t see it, their documents, and which begin one; before: the documents of tokens t - 1."""
    document = tl.load(ids + t, mask=(t >= 0) & (t < T), other=-1).to(tl.int32)
    begins = (document != before) & (document >= 0)
    entered = ()
    for k in tl.static_range(1, W):
        state = 0.0
        if HAS_INITIAL:
            places = (document.to(tl.int64) * (W - 1) + (W - 1 - k))[:, None] * D + columns[None, :]
            state = tl.load(initial + places, mask=begins[:, None] & inside, other=0.0).to(tl.float32)
        entered = entered + (tl.where(begins[:, None], state, window[k - 1]),)
    return entered, document, begins


@triton.jit
def _zeros(ROWS: tl.constexpr, B: tl.constexpr, COUNT: tl.constexpr):
    """COUNT of them."""
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros([ROWS, B], tl.float32),)
    return zeros


@triton.jit
def _window(
    earlier, ids, initial, t, columns, inside, T, D,
    W: tl.constexpr, BORDERS: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """x_{t-1}, ..., x_{t-W+1}, [ROWS, B] each in float32, and the documents of tokens t - 1; earlier: oldest first."""
    window = _zeros(t.shape[0], columns.shape[0], W - 1)
    before = tl.zeros_like(t) - 1
    for k in tl.static_range(1, W):
        if BORDERS:
            window, before, _ = _enter(window, before, ids, initial, t - (W - k), columns, inside, T, D, W, HAS_INITIAL)
        window = _push(window, earlier[k - 1].to(tl.float32), W)
    return window, before


@triton.jit
def _push(window, now, W: tl.constexpr):
    """The window of the next token."""
    if W > 1:
        window = (now,) + window[: W - 2]
    return window


@triton.jit
def _convolve(taps, b, now, window, W: tl.constexpr):
    p = b + taps[0] * now
    for k in tl.static_range(1, W):
        p += taps[k] * window[k - 1]
    return p


@triton.jit
def _sigmoid(p):
    """1 / (1 + e^-p) in four instructions: the compiler spends three times as many on what lies below 2^-126."""
    if INTERPRETED:
        s = tl.sigmoid(p)
    else:
        s = tl.inline_asm_elementwise(
            """{
                .reg .f32 e;
                mul.f32 e, $1, 0fBFB8AA3B;
                ex2.approx.ftz.f32 e, e;
                add.f32 e, e, 0f3F800000;
                rcp.approx.ftz.f32 $0, e;
            }""",
            "=f,f", [p], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return s


@triton.jit
def _through_activation(dy, taps, b, now, window, W: tl.constexpr, SILU: tl.constexpr):
    """g = dy act'(p)."""
    if SILU:
        p = _convolve(taps, b, now, window, W)
        s = _sigmoid(p)
        dy = dy * (s * (1 + p * (1 - s)))
    return dy


@triton.jit
def _forward_tile(
    xs, ids, initial, ys, taps, b, earlier, starts, span, columns, inside, T, D, stride,
    W: tl.constexpr, SILU: tl.constexpr, BORDERS: tl.constexpr, HAS_INITIAL: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    window, before = _window(earlier, ids, initial, starts, columns, inside, T, D, W, BORDERS, HAS_INITIAL)
    for i in range(0, span, STEP):
        inputs = _rows(xs, stride, starts, i, inside, T, STEP)
        for j in tl.static_range(STEP):
            now = inputs[j].to(tl.float32)
            if BORDERS:
                t = starts + (i + j)
                window, before, _ = _enter(window, before, ids, initial, t, columns, inside, T, D, W, HAS_INITIAL)
            p = _convolve(taps, b, now, window, W)
            if SILU:
                p = p * _sigmoid(p)
            mask = (starts + (i + j) < T)[:, None] & inside
            tl.store(ys + (i + j) * D, p.to(ys.dtype.element_ty), mask=mask)
            window = _push(window, now, W)


@triton.jit(do_not_specialize=["T"])
def convolve_forward(
    x, weight, bias, ids, initial, y, T, D, stride, span,
    W: tl.constexpr, PADDED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, SILU: tl.constexpr,
    B: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of channels, tiles of tokens; y: [T, D], contiguous."""
    columns = tl.program_id(0) * B + tl.arange(0, B)
    inside = (columns < D)[None, :]
    first = tl.program_id(1) * (ROWS * span)
    starts = first + tl.arange(0, ROWS) * span
    xs, ys = _places(x, starts, columns, stride), _places(y, starts, columns, D)
    earlier = _rows(xs, stride, starts, 1 - W, inside, T, W - 1)  # Ahead of the branch, which waits for ids.
    taps, b = _taps(weight, columns, D, W, PADDED), _shift(bias, columns, D, HAS_BIAS)
    if _one_document(ids, first - (W - 1), first + ROWS * span - 1, T, HAS_INITIAL):
        _forward_tile(
            xs, ids, initial, ys, taps, b, earlier, starts, span, columns, inside, T, D, stride,
            W, SILU, False, HAS_INITIAL, STEP,
        )  # fmt: skip
    else:
        _forward_tile(
            xs, ids, initial, ys, taps, b, earlier, starts, span, columns, inside, T, D, stride,
            W, SILU, True, HAS_INITIAL, STEP,
        )  # fmt: skip


@triton.jit
def _hand_back(handed, taps, g, age, W: tl.constexpr, BORDERS: tl.constexpr):
    """dx of tokens t, t - 1, ..., t - W + 1 so far: handed, of t - 1, ..., and what g_t adds; age: t's place in its
    document."""
    after = (taps[0] * g,)
    for k in tl.static_range(1, W):
        more = taps[k] * g
        if BORDERS:
            more = tl.where((age >= k)[:, None], more, 0.0)
        after = after + (handed[k - 1] + more,)
    return after


@triton.jit
def _backward_steps(
    xs, ids, initial, dys, dxs, taps, b, starts, i, columns, inside, T, D, stride, stride_dy,
    window, before, age, handed, dtaps, db,
    W: tl.constexpr, SILU: tl.constexpr, BORDERS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    STEP: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Tokens starts + i, ..., of which there are STEP; those that are not the span's OWN give nothing to dw and db."""
    inputs = _rows(xs, stride, starts, i, inside, T, STEP)
    gradients = _rows(dys, stride_dy, starts, i, inside, T, STEP)
    for j in tl.static_range(STEP):
        now = inputs[j].to(tl.float32)
        if BORDERS:
            t = starts + (i + j)
            window, before, begins = _enter(window, before, ids, initial, t, columns, inside, T, D, W, HAS_INITIAL)
            age = tl.where(begins, 0, age + 1)
        g = _through_activation(gradients[j].to(tl.float32), taps, b, now, window, W, SILU)
        if OWN:
            sums = (dtaps[0] + g * now,)
            for k in tl.static_range(1, W):
                sums = sums + (dtaps[k] + g * window[k - 1],)
            dtaps = sums
            db += g
        handed = _hand_back(handed, taps, g, age, W, BORDERS)
        whole = i + j - (W - 1)  # Of the span: those before it are other programs'.
        mask = ((starts + whole >= starts) & (starts + whole < T))[:, None] & inside
        tl.store(dxs + whole * D, handed[W - 1].to(dxs.dtype.element_ty), mask=mask)
        handed = handed[: W - 1]
        window = _push(window, now, W)
    return window, before, age, handed, dtaps, db


@triton.jit
def _backward_tile(
    xs, ids, initial, dys, dxs, sums, taps, b, earlier, starts, span, columns, inside, T, D, stride, stride_dy,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, BORDERS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = starts.shape[0]
    B: tl.constexpr = columns.shape[0]
    window, before = _window(earlier, ids, initial, starts, columns, inside, T, D, W, BORDERS, HAS_INITIAL)
    handed, dtaps, db = _zeros(ROWS, B, W - 1), _zeros(ROWS, B, W), tl.zeros([ROWS, B], tl.float32)
    age = tl.zeros_like(starts) + W
    for i in range(0, span, STEP):
        window, before, age, handed, dtaps, db = _backward_steps(
            xs, ids, initial, dys, dxs, taps, b, starts, i, columns, inside, T, D, stride, stride_dy,
            window, before, age, handed, dtaps, db, W, SILU, BORDERS, HAS_INITIAL, STEP, True,
        )  # fmt: skip
    _backward_steps(
        xs, ids, initial, dys, dxs, taps, b, starts, span, columns, inside, T, D, stride, stride_dy,
        window, before, age, handed, dtaps, db, W, SILU, BORDERS, HAS_INITIAL, W - 1, False,
    )  # fmt: skip
    sums += tl.program_id(1).to(tl.int64) * (W + HAS_BIAS) * D
    for k in tl.static_range(W):
        tl.store(sums + k * D + columns, tl.sum(dtaps[k], 0), mask=columns < D)
    if HAS_BIAS:
        tl.store(sums + W * D + columns, tl.sum(db, 0), mask=columns < D)


@triton.jit(do_not_specialize=["T"])
def convolve_backward(
    x, weight, bias, ids, initial, dy, dx, sums, T, D, stride, stride_dy, span,
    W: tl.constexpr, PADDED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, SILU: tl.constexpr,
    B: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of channels, tiles of tokens; dx: [T, D], contiguous; sums: [tiles, W + HAS_BIAS, D], dw_0, dw_1,
    ... and db of each tile."""
    columns = tl.program_id(0) * B + tl.arange(0, B)
    inside = (columns < D)[None, :]
    first = tl.program_id(1) * (ROWS * span)
    starts = first + tl.arange(0, ROWS) * span
    xs, dys = _places(x, starts, columns, stride), _places(dy, starts, columns, stride_dy)
    dxs = _places(dx, starts, columns, D)
    earlier = _rows(xs, stride, starts, 1 - W, inside, T, W - 1)  # Ahead of the branch, which waits for ids.
    taps, b = _taps(weight, columns, D, W, PADDED), _shift(bias, columns, D, HAS_BIAS)
    if _one_document(ids, first - (W - 1), first + ROWS * span + W - 2, T, HAS_INITIAL):
        _backward_tile(
            xs, ids, initial, dys, dxs, sums, taps, b, earlier, starts, span, columns, inside, T, D, stride, stride_dy,
            W, HAS_BIAS, SILU, False, HAS_INITIAL, STEP,
        )  # fmt: skip
    else:
        _backward_tile(
            xs, ids, initial, dys, dxs, sums, taps, b, earlier, starts, span, columns, inside, T, D, stride, stride_dy,
            W, HAS_BIAS, SILU, True, HAS_INITIAL, STEP,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tiles"])
def convolve_sums(
    sums, dweight, dbias, tiles, D, W: tl.constexpr, HAS_BIAS: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr
):
    """The sums of all tiles; grid: blocks of channels, W + HAS_BIAS."""
    columns, k = tl.program_id(0) * B + tl.arange(0, B), tl.program_id(1)
    total = tl.zeros([ROWS, B], tl.float32)
    for i in range(0, tiles, ROWS):
        tile = i + tl.arange(0, ROWS)
        mask = (tile < tiles)[:, None] & (columns < D)[None, :]
        places = (tile.to(tl.int64) * (W + HAS_BIAS) + k)[:, None] * D + columns[None, :]
        total += tl.load(sums + places, mask=mask, other=0.0)
    result = tl.sum(total, 0)
    if k < W:
        tl.store(dweight + columns * W + (W - 1 - k), result.to(dweight.dtype.element_ty), mask=columns < D)
    else:
        tl.store(dbias + columns, result.to(dbias.dtype.element_ty), mask=columns < D)


@triton.jit
def convolve_initial(
    x, weight, bias, borders, initial, dy, dinitial, D, stride, stride_dy,
    W: tl.constexpr, PADDED: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """What the first W - 1 tokens of a segment hand back to its state; grid: blocks of channels, segments."""
    columns, n = tl.program_id(0) * B + tl.arange(0, B), tl.program_id(1)
    taps, b = _taps(weight, columns, D, W, PADDED), _shift(bias, columns, D, HAS_BIAS)
    inside, oldest = (columns < D)[None, :], n.to(tl.int64) * (W - 1) + tl.arange(0, 1)
    start, end = tl.load(borders + n) + tl.arange(0, 1), tl.load(borders + n + 1)
    xs, dys = _places(x, start, columns, stride), _places(dy, start, columns, stride_dy)
    states, dstates = _places(initial, oldest, columns, D), _places(dinitial, oldest, columns, D)
    window = ()
    for k in tl.static_range(1, W):
        window = window + (tl.load(states + (W - 1 - k) * D, mask=inside, other=0.0).to(tl.float32),)
    inputs = _rows(xs, stride, start, 0, inside, end, W - 1)
    gradients = _rows(dys, stride_dy, start, 0, inside, end, W - 1)
    handed = _zeros(1, B, W - 1)
    for i in tl.static_range(W - 1):
        now = inputs[i].to(tl.float32)
        g = _through_activation(gradients[i].to(tl.float32), taps, b, now, window, W, SILU)
        after = ()
        for k in tl.static_range(1, W):
            more = 0.0
            if i + k < W:
                more = taps[i + k] * g
            after = after + (handed[k - 1] + more,)
        handed = after
        window = _push(window, now, W)
    for k in tl.static_range(1, W):
        tl.store(dstates + (W - 1 - k) * D, handed[k - 1].to(dinitial.dtype.element_ty), mask=inside)
