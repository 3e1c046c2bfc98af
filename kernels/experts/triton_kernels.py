"""Triton kernels: grouped products that read tokens where they lie, with the gates or their gradients at their end.

A tile is BM rows of one expert by BN hidden channels. Which rows those are is written down once for both products. With
rows [a a a | b b b b b | d] and BM = 2:

    tiles    [a 0] [a 2] [b 3] [b 5] [b 7] [d 8]      expert and first row of each

A program finds the tokens of its rows by `order` (see `kernels.dispatch`), so no row is copied before a product. The
first has a tile of gates and the same channels of up in hand, rounds them as they are kept, and writes w silu(g) u
beside them. The second has a tile of dh, the gradient of silu(g) u but for w, reads g and u, and writes their gradients
and w silu(g) u again; of each row its sum over BN channels of dh silu(g) u, whose sum over blocks is the gradient of w.

Rows that no expert has are not in a tile. Rows of the last tile of an expert that are not its own read the first
assignment's token and are not written. Sums run over BK channels at a time, in one order: the same bits on every run.

R rows, D model width, F expert width, E experts.
"""

# Constants of the compiler are not what Python takes them for.
# pyright: basic, reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def sort_tiles(offsets, tiles, count, E, BM: tl.constexpr, BINS: tl.constexpr, AT_ONCE: tl.constexpr):
    """Grid: blocks of AT_ONCE tiles. tiles: int32 [count, 2], expert, -1 where there are no more, and first row."""
    bins = tl.arange(0, BINS)
    ends = tl.load(offsets + bins, mask=bins < E, other=0)
    starts = tl.load(offsets + bins - 1, mask=(bins > 0) & (bins < E), other=0)
    own = tl.where(bins < E, (ends - starts + BM - 1) // BM, 0)
    after = tl.cumsum(own, 0)  # tiles of all experts up to this one
    at = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    expert = tl.sum((after[None, :] <= at[:, None]).to(tl.int32), 1)
    first = tl.where(bins[None, :] == expert[:, None], (starts - (after - own) * BM)[None, :], 0)
    tl.store(tiles + 2 * at, tl.where(expert < BINS, expert, -1), mask=at < count)
    tl.store(tiles + 2 * at + 1, tl.sum(first, 1) + at * BM, mask=at < count)


@triton.jit
def grouped_mm_gated(
    x, order, weights, matrices, tiles, offsets, gate_up, h, D, F, stride, stride_expert, stride_row,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid: tiles times blocks of BN channels, blocks first. BK divides D, BN divides F.

    x: [T, D], matrices: [E, D, 2F], columns side by side; gate_up: [R, 2F], h: [R, F], weights: [T, K], contiguous.
    """
    blocks = F // BN
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    expert = tl.load(tiles + 2 * tile)
    if expert >= 0:
        first, own = tl.load(tiles + 2 * tile + 1), tl.arange(0, BM)
        inside = own < tl.load(offsets + expert) - first
        assignment = tl.load(order + first + own, mask=inside, other=0)
        columns, inner = block * BN + tl.arange(0, BN), tl.arange(0, BK)
        xs = x + (assignment // K)[:, None] * stride + inner[None, :]
        gates = matrices + expert.to(tl.int64) * stride_expert + inner[:, None] * stride_row + columns[None, :]
        ups = gates + F
        gate, up = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
        for _ in range(0, D, BK):
            a = tl.load(xs)
            gate = tl.dot(a, tl.load(gates), gate, input_precision="ieee")
            up = tl.dot(a, tl.load(ups), up, input_precision="ieee")
            xs += BK
            gates += BK * stride_row
            ups += BK * stride_row
        kept_gate, kept_up = gate.to(h.dtype.element_ty), up.to(h.dtype.element_ty)
        start, mask = first.to(tl.int64) * F, inside[:, None]
        places = gate_up + 2 * start + own[:, None] * (2 * F) + columns[None, :]
        tl.store(places, kept_gate, mask=mask)
        tl.store(places + F, kept_up, mask=mask)
        gate, up = kept_gate.to(tl.float32), kept_up.to(tl.float32)
        y = gate * tl.sigmoid(gate) * up
        y *= tl.load(weights + assignment, mask=inside, other=0.0).to(tl.float32)[:, None]
        tl.store(h + start + own[:, None] * F + columns[None, :], y.to(h.dtype.element_ty), mask=mask)


@triton.jit
def _halves(x):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _gradients(d, gate_up, dgate_up, h, own, columns, mask, weight, F):
    """Writes those of gate and up, and h; the sums over columns of d silu(g) u."""
    places = own[:, None] * (2 * F) + columns[None, :]
    gate = tl.load(gate_up + places, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + places + F, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    silu = gate * s
    y = silu * up
    d = d.to(tl.float32)
    dot = tl.sum(d * y, 1)
    d *= weight
    tl.store(dgate_up + places, (d * up * s * (1 + gate * (1 - s))).to(h.dtype.element_ty), mask=mask)
    tl.store(dgate_up + places + F, (d * silu).to(h.dtype.element_ty), mask=mask)
    tl.store(h + own[:, None] * F + columns[None, :], (y * weight).to(h.dtype.element_ty), mask=mask)
    return dot


@triton.jit(do_not_specialize=["R"])
def grouped_mm_gated_backward(
    dy, order, weights, matrices, tiles, offsets, gate_up, dgate_up, h, dweights, R, D, F, stride, stride_expert,
    stride_row, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid: tiles times blocks of BN channels, blocks first. BK divides D, BN divides F.

    dy: [T, D], matrices: [E, F, D], columns side by side; gate_up, dgate_up: [R, 2F], h: [R, F], weights: [T, K],
    dweights: float32 [F / BN, R] by assignment, contiguous.
    """
    blocks = F // BN
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    expert = tl.load(tiles + 2 * tile)
    if expert >= 0:
        first, own = tl.load(tiles + 2 * tile + 1), tl.arange(0, BM)
        inside = own < tl.load(offsets + expert) - first
        assignment = tl.load(order + first + own, mask=inside, other=0)
        columns, inner = block * BN + tl.arange(0, BN), tl.arange(0, BK)
        ds = dy + (assignment // K)[:, None] * stride + inner[None, :]
        downs = matrices + expert.to(tl.int64) * stride_expert + columns[None, :] * stride_row + inner[:, None]
        dh = tl.zeros([BM, BN], tl.float32)
        for _ in range(0, D, BK):
            dh = tl.dot(tl.load(ds), tl.load(downs), dh, input_precision="ieee")
            ds += BK
            downs += BK
        start, mask = first.to(tl.int64) * F, inside[:, None]
        gate_up, dgate_up, h = gate_up + 2 * start, dgate_up + 2 * start, h + start
        weight = tl.load(weights + assignment, mask=inside, other=0.0).to(tl.float32)[:, None]
        left, right = _halves(dh.to(h.dtype.element_ty))
        columns, Q = block * BN + tl.arange(0, BN // 4), BN // 4
        a, b = _halves(left)
        dot = _gradients(a, gate_up, dgate_up, h, own, columns, mask, weight, F)
        tl.debug_barrier()
        dot += _gradients(b, gate_up, dgate_up, h, own, columns + Q, mask, weight, F)
        tl.debug_barrier()
        a, b = _halves(right)
        dot += _gradients(a, gate_up, dgate_up, h, own, columns + 2 * Q, mask, weight, F)
        tl.debug_barrier()
        dot += _gradients(b, gate_up, dgate_up, h, own, columns + 3 * Q, mask, weight, F)
        tl.store(dweights + block.to(tl.int64) * R + assignment, dot, mask=inside)
