"""The routed experts: E networks over rows sorted by expert, or over tokens that say which of them they want.

    y[r] = (silu(x[r] Wg_e) * (x[r] Wu_e)) Wd_e      SwiGLU, for the expert e of row r
    y[r] = relu(x[r] Wu_e)^2 Wd_e                    squared ReLU, without gates: `up` [E, D, F] and `down`

Gate and up are one parameter [E, D, 2F], gate first: one product with twice the width instead of two, one gradient of
x instead of two and their sum. An expert stays one block of dim 0, so expert parallelism shards dim 0 as it is; a
Hugging Face checkpoint's `gate_proj.weight`, `up_proj.weight` [F, D] and `down_proj.weight` [D, F] of expert e are
`gate_up[e, :, :F].T`, `gate_up[e, :, F:].T` and `down[e].T`.

T tokens, k experts a token, R rows, D width of what enters an expert, F expert width, E experts (the local ones under
expert parallelism).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchlinearmoe.initialize import Normal, set_initializers
from torchlinearmoe.kernels import experts as whole
from torchlinearmoe.kernels import grouped_mm as products
from torchlinearmoe.kernels.choose import KernelCall, choose
from torchlinearmoe.kernels.experts.plain import BACKEND as STEP_BY_STEP
from torchlinearmoe.kernels.experts.plain import expert_rows
from torchlinearmoe.kernels.operator import Call
from torchlinearmoe.module import Module


class Assigned(NamedTuple):
    """What tokens want of the experts."""

    ids_Tk: Tensor
    weights_Tk: Tensor
    keep_Tk: Tensor | None


class Experts(Module):
    """E experts as two 3-D parameters, `gate_up` [E, D, 2F], or `up` [E, D, F], and `down` [E, F, D].

    activation: "swiglu" or "relu2", as `model.activation`.
    backend: "auto", one of `kernels/experts/` for the whole way from tokens to their sums, or one of
    `kernels/grouped_mm/` for the products on it.
    """

    regions = ("forward",)
    gate_up: nn.Parameter | None
    up: nn.Parameter | None

    def __init__(
        self,
        width: int,
        hidden_size: int,
        num_experts: int,
        *,
        activation: str = "swiglu",
        backend: str = "auto",
        std: float = 0.02,
        out_std: float = 0.02,
    ):
        super().__init__()
        self.whole = backend if backend in whole.OPERATOR.find_backends() else "auto"
        self.products = backend if self.whole == "auto" or backend in products.OPERATOR.find_backends() else "auto"
        self.gated = activation == "swiglu"
        self.register_parameter("gate_up", None)
        self.register_parameter("up", None)
        if self.gated:
            self.gate_up = nn.Parameter(torch.empty(num_experts, width, 2 * hidden_size))
        else:
            self.up = nn.Parameter(torch.empty(num_experts, width, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, width))
        set_initializers(self, **{"gate_up" if self.gated else "up": Normal(std)}, down=Normal(out_std))

    @property
    def into(self) -> Tensor:
        """The matrices that tokens enter by."""
        into = self.gate_up if self.gated else self.up
        assert into is not None
        return into

    def kernel_calls(self, device: str, dtype: torch.dtype) -> Iterator[KernelCall]:
        """The two products, and the whole of which they are a part."""
        for _, inner, outer in (self.into.shape, self.down.shape):
            yield products.OPERATOR, self.products, products.call(inner, outer, device, dtype)
        yield whole.OPERATOR, self.whole, self._call(device, dtype)

    def take_tokens(self, x_TD: Tensor) -> bool:
        """Whether the backend goes from tokens to their sums by itself; else rows are sorted and summed around it."""
        return choose(whole.OPERATOR, self.whole, self._call(x_TD.device.type, x_TD.dtype)) is not STEP_BY_STEP

    def would_take_tokens(self, device: str, dtype: torch.dtype) -> bool:
        """The same of a machine that need not be this one: what the recipe names counts as installed there."""
        call = self._call(device, dtype)
        if self.whole != "auto":
            named = whole.OPERATOR.find_backends().get(self.whole, STEP_BY_STEP)
            return named is not STEP_BY_STEP and call.kind in named.kinds and dtype in named.dtypes
        return choose(whole.OPERATOR, self.whole, call) is not STEP_BY_STEP

    def _call(self, device: str, dtype: torch.dtype) -> Call:
        return whole.call(self.down.shape[2], self.down.shape[1], device, dtype, self.gated)

    def forward(
        self,
        x: Tensor,
        counts_E: Tensor | None = None,
        padded: bool = False,
        assigned: Assigned | None = None,
    ) -> Tensor:
        """Rows to rows, or with `assigned` tokens [T, D] to their weighted sums [T, D].

        x: [R, D] sorted by expert; counts_E: integer [E], rows of each expert, on x's device. Returns [R, D].

        With `padded` there may be more rows than `counts_E` sums to: whatever the surplus rows at the end hold, they
        give zeros and receive zero gradients. Without it the counts must sum to R (not checked: that would stop the
        GPU).
        """
        gate_up_EDF, down_EFD = self.into, self.down
        if assigned is None:
            assert counts_E is not None
            return expert_rows(x, counts_E, gate_up_EDF, down_EFD, padded, self.products)
        ids_Tk, weights_Tk, keep_Tk = assigned
        return whole.routed_experts(
            x, ids_Tk, weights_Tk, gate_up_EDF, down_EFD, keep_Tk, products=self.products, backend=self.whole
        )
