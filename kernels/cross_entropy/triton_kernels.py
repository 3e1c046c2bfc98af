"""Cross entropy of rows of logits and its gradient, which takes the logits' place: one launch, a row by one program.

A row is read twice: for max and sum of exponentials, then for its gradient, exp(x - lse) - [x is the label's]. The
second time it comes from the second-level cache, where as many rows lie as there are programs. Lanes are 8 columns
wide: each has a maximum of its own, so one in nine exponentials is for moving sums to a new maximum.

C rows, V columns.
"""

# Constants of the compiler are not what Python takes them for.
# pyright: basic, reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["C"])
def cross_entropy_rows(
    logits, labels, losses, C, V, stride, ignored,
    GRADIENT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: any. losses: float32 [C], 0 where the label is `ignored`; logits become their gradient if GRADIENT."""
    B: tl.constexpr = LANES * WIDTH
    lane = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    for row in range(tl.program_id(0), C, tl.num_programs(0)):
        xs = logits + (tl.full([], 0, tl.int64) + row) * stride
        label = tl.load(labels + row)
        valid = label != ignored
        target = tl.load(xs + tl.where(valid, label, 0)).to(tl.float32)
        most, total = tl.full([LANES], -1e38, tl.float32), tl.zeros([LANES], tl.float32)
        for start in tl.range(0, V, B, num_stages=STAGES):
            columns = start + lane
            x = tl.load(xs + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
            more = tl.maximum(most, tl.max(x, 1))
            total = total * tl.exp(most - more) + tl.sum(tl.exp(x - more[:, None]), 1)
            most = more
        top = tl.max(most, 0)
        log_total = top + tl.log(tl.sum(total * tl.exp(most - top), 0))
        tl.store(losses + row, tl.where(valid, log_total - target, 0.0))
        if GRADIENT:
            scale = tl.where(valid, 1.0, 0.0)
            for start in tl.range(0, V, B, num_stages=STAGES):
                columns = start + lane
                x = tl.load(xs + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
                d = (tl.exp(x - log_total) - tl.where(columns == label, 1.0, 0.0)) * scale
                tl.store(xs + columns, d.to(logits.dtype.element_ty), mask=columns < V)
