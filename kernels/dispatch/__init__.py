"""Rows of tokens in the order of their experts, and back.

T = 3 tokens, k = 2, ids [[2, 0], [0, 1], [2, 1]]. The assignments, numbered t * k + j, sorted by expert:

    expert       0 0 | 1 1 | 2 2
    order_R      1 2 | 3 5 | 0 4      assignment in each row; its token is order // k
    inverse_Tk   [[4, 0], [1, 2], [5, 3]]   row of each assignment: order[inverse[t, j]] == t * k + j

`spread` reads `x[order // k]`, `weighted_sum` reads `y[inverse]`. Since one index undoes the other, both gradients are
reads as well: no atomic additions anywhere, hence the same bits on every run, and nothing waits for the device.

T tokens, k experts a token, R = T * k rows, D model width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinearmoe.kernels.choose import choose
from torchlinearmoe.kernels.operator import Budget, Call, Operator

OPERATOR = Operator("dispatch", ("sort", "spread", "weighted_sum"))
"""A backend's `run` takes the kind first."""


def sort(
    ids_Tk: Tensor, num_experts: int, keep_Tk: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Assignments by expert, those of an expert in their order.

    ids_Tk: int [T, k]; keep_Tk: bool [T, k], False where an assignment is dropped, None when all stay. Returns order_R
    int64 [R], inverse_Tk int64 [T, k], counts_E int64 [E]. Dropped assignments come last and are not counted.
    """
    call = Call("sort", ids_Tk.device.type, torch.float32)
    return choose(OPERATOR, backend, call).run("sort", ids_Tk, num_experts, keep_Tk)


def spread(x_TD: Tensor, order_R: Tensor, inverse_Tk: Tensor, backend: str = "auto") -> Tensor:
    """x[order // k], [T, D] -> [R, D]. The gradient sums the k rows of a token in float32, in the order of j."""
    call = Call("spread", x_TD.device.type, x_TD.dtype)
    return choose(OPERATOR, backend, call).run("spread", x_TD, order_R, inverse_Tk)


def permute(x_RD: Tensor, order_R: Tensor, inverse_R: Tensor, backend: str = "auto") -> Tensor:
    """x[order], a permutation whose inverse is given."""
    return spread(x_RD, order_R, inverse_R.unsqueeze(1), backend)


def weighted_sum(
    rows_RD: Tensor, weights_Tk: Tensor, order_R: Tensor, inverse_Tk: Tensor, backend: str = "auto"
) -> Tensor:
    """y_t = sum_j w[t, j] * rows[inverse[t, j]], [R, D] -> [T, D]; in the weights' type, in the order of j."""
    call = Call("weighted_sum", rows_RD.device.type, rows_RD.dtype)
    return choose(OPERATOR, backend, call).run("weighted_sum", rows_RD, weights_Tk, order_R, inverse_Tk)


def budget(tokens: int, top_k: int, width: int, itemsize: int = 2) -> Budget:
    """Of `spread` and `weighted_sum` together; indices and weights are small beside the rows."""
    token, rows = tokens * width * itemsize, tokens * top_k * width * itemsize
    return Budget(
        flops=2.0 * tokens * top_k * width,
        forward_bytes=2 * (token + rows),
        backward_bytes=2 * token + 3 * rows,
        saved_bytes=rows,
    )
