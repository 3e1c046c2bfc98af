"""Triton kernels of h = [w] silu(g) u and its gradients, for rows [g | u], computed in float32 and rounded once.

With s = sigmoid(g), silu'(g) = s (1 + g (1 - s)), and a weight w a row,

    dg = w dh u s (1 + g (1 - s)),   du = w dh g s,   dw = sum over the row of dh g s u

h is made again in the pass that makes its gradients, where it is wanted: it need not be kept.

Weights lie in the order of assignments, `order` says which row has which (see `kernels.dispatch`). Rows from `limit`
on, where there is one, belong to nobody: nothing is written but the gradient of their weights, 0.

R rows, F hidden width.
"""

# Constants of the compiler are not what Python takes them for.
# pyright: basic, reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def _gate_and_up(gate_up, wide, columns, F, mask):
    places = gate_up + wide * (2 * F) + columns[None, :]
    gate = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    return gate, tl.load(places + F, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["R"])
def swiglu_forward(
    gate_up, weights, order, limit, h, R, F,
    WEIGHTED: tl.constexpr, LIMITED: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of rows, blocks of columns; gate_up: [R, 2F], h: [R, F], contiguous."""
    r, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * B + tl.arange(0, B)
    inside = r < R
    if LIMITED:
        inside = r < tl.load(limit)
    wide, mask = r.to(tl.int64)[:, None], inside[:, None] & (columns < F)[None, :]
    gate, up = _gate_and_up(gate_up, wide, columns, F, mask)
    y = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        assignment = tl.load(order + r, mask=inside, other=0)
        y *= tl.load(weights + assignment, mask=inside, other=0.0).to(tl.float32)[:, None]
    tl.store(h + wide * F + columns[None, :], y.to(h.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R"])
def swiglu_backward(
    gate_up, weights, order, limit, dh, dgate_up, h, dweights, R, F, stride,
    WEIGHTED: tl.constexpr, LIMITED: tl.constexpr, AGAIN: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of rows. dh: rows of any stride; the others are contiguous. h is written if AGAIN."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = r < R
    inside = exists
    if LIMITED:
        inside = r < tl.load(limit)
    wide = r.to(tl.int64)[:, None]
    weight = tl.full([ROWS, 1], 1.0, tl.float32)
    if WEIGHTED:
        assignment = tl.load(order + r, mask=exists, other=0)
        weight = tl.load(weights + assignment, mask=inside, other=0.0).to(tl.float32)[:, None]
    dot = tl.zeros([ROWS, B], tl.float32)
    for start in range(0, F, B):
        columns = start + tl.arange(0, B)
        mask = inside[:, None] & (columns < F)[None, :]
        gate, up = _gate_and_up(gate_up, wide, columns, F, mask)
        d = tl.load(dh + wide * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        s = tl.sigmoid(gate)
        silu = gate * s
        if WEIGHTED:
            dot += d * silu * up
            d *= weight
        places = dgate_up + wide * (2 * F) + columns[None, :]
        tl.store(places, (d * up * s * (1 + gate * (1 - s))).to(dgate_up.dtype.element_ty), mask=mask)
        tl.store(places + F, (d * silu).to(dgate_up.dtype.element_ty), mask=mask)
        if AGAIN:
            again = silu * up
            if WEIGHTED:
                again *= weight
            tl.store(h + wide * F + columns[None, :], again.to(h.dtype.element_ty), mask=mask)
    if WEIGHTED:
        tl.store(dweights + assignment, tl.sum(dot, 1).to(dweights.dtype.element_ty), mask=exists)
