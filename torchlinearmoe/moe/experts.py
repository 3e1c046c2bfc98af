"""The routed experts: E SwiGLU networks over rows sorted by expert.

y[r] = (silu(x[r] Wg_e) * (x[r] Wu_e)) Wd_e for the expert e of row r.

Gate and up are one parameter [E, D, 2F], gate first: one product with twice the width instead of two, one gradient of
x instead of two and their sum. An expert stays one block of dim 0, so expert parallelism shards dim 0 as it is; a
Hugging Face checkpoint's `gate_proj.weight`, `up_proj.weight` [F, D] and `down_proj.weight` [D, F] of expert e are
`gate_up[e, :, :F].T`, `gate_up[e, :, F:].T` and `down[e].T`.

R rows, D model width, F expert width, E experts (the local ones under expert parallelism).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from torchlinearmoe.initialize import Normal, set_initializers
from torchlinearmoe.kernels import grouped_mm as products
from torchlinearmoe.kernels.choose import KernelCall
from torchlinearmoe.kernels.grouped_mm import grouped_mm
from torchlinearmoe.kernels.swiglu import swiglu
from torchlinearmoe.module import Module


class Experts(Module):
    """E SwiGLU experts as two 3-D parameters, `gate_up` [E, D, 2F] and `down` [E, F, D].

    backend: of their products, "auto" or one of `kernels/grouped_mm/`.
    """

    regions = ("forward",)

    def __init__(
        self,
        width: int,
        hidden_size: int,
        num_experts: int,
        *,
        backend: str = "auto",
        std: float = 0.02,
        out_std: float = 0.02,
    ):
        super().__init__()
        self.backend = backend
        self.gate_up = nn.Parameter(torch.empty(num_experts, width, 2 * hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, width))
        set_initializers(self, gate_up=Normal(std), down=Normal(out_std))

    def kernel_calls(self, device: str, dtype: torch.dtype) -> Iterator[KernelCall]:
        """The two products."""
        for _, inner, outer in (self.gate_up.shape, self.down.shape):
            yield products.OPERATOR, self.backend, products.call(inner, outer, device, dtype)

    def forward(self, x_RD: Tensor, counts_E: Tensor, padded: bool = False) -> Tensor:
        """x_RD: [R, D] sorted by expert; counts_E: integer [E], rows of each expert, on x's device. Returns [R, D].

        With `padded` there may be more rows than `counts_E` sums to: whatever the surplus rows at the end hold, they
        give zeros and receive zero gradients. Without it the counts must sum to R (not checked: that would stop the
        GPU).
        """
        gate_up_EDF, down_EFD = self.gate_up, self.down
        backend = self.backend
        offsets_E = counts_E.cumsum(0).to(torch.int32)
        if not padded:
            hidden_RF = swiglu(grouped_mm(x_RD, gate_up_EDF, offsets_E, backend))
            return grouped_mm(hidden_RF, down_EFD, offsets_E, backend)
        # torch.where on both sides: forward it keeps unspecified memory out of y, backward out of the gradient of x.
        # In between the surplus rows may hold anything: no product sums over them.
        real_R1 = (torch.arange(x_RD.shape[0], device=x_RD.device) < offsets_E[-1]).unsqueeze(1)
        x_RD = torch.where(real_R1, x_RD, 0)
        hidden_RF = swiglu(grouped_mm(x_RD, gate_up_EDF, offsets_E, backend))
        return torch.where(real_R1, grouped_mm(hidden_RF, down_EFD, offsets_E, backend), 0)
