"""flash-linear-attention's chunk_rwkv7: larger chunks where the caller bounds the decays from below."""

from torch import Tensor

from torchlinearmoe.kernels import flash_linear
from torchlinearmoe.kernels.flash_linear import even, gate
from torchlinearmoe.kernels.operator import Backend, outside_graphs
from torchlinearmoe.segments import Segments


@outside_graphs
def dplr_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    lower_bound: float | None,
    scale: float,
    segments: Segments,
    initial_state: Tensor | None,
    want_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `definition.dplr_rule`; no log decay is below `lower_bound`."""
    K, V = q.shape[-1], v.shape[-1]
    tokens = {"r": even(q), "w": even(gate(log_decay))}
    tokens |= {name: even(x.to(q.dtype)) for name, x in (("k", k), ("v", v), ("a", a), ("b", b))}
    initial = flash_linear.even_state(initial_state)
    fixed = {"lower_bound": lower_bound}
    o, final = flash_linear.run("chunk_rwkv7", tokens, fixed, scale, segments, initial, want_final)
    return flash_linear.without_final(o, final, K, V)


BACKEND = Backend(run=dplr_rule, kinds=("dplr",), refuses=flash_linear.at_most_256_channels, **flash_linear.DECLARED)
