"""flash-linear-attention's chunk_gsa, whose products sum over at least 16 slots."""

from torch import Tensor

from torchlinearmoe.kernels import flash_linear
from torchlinearmoe.kernels.flash_linear import even, gate
from torchlinearmoe.kernels.operator import Backend, outside_graphs
from torchlinearmoe.segments import Segments


@outside_graphs
def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    log_decay: Tensor,
    scale: float,
    segments: Segments,
    initial_state: tuple[Tensor, Tensor] | None,
    want_final: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """As `definition.slot_attention`."""
    K, V = q.shape[-1], v.shape[-1]
    q, k, v = even(q), even(k.to(q.dtype)), even(v.to(q.dtype))
    tokens = {"q": q, "k": k, "v": v, "s": s.to(q.dtype), "g": gate(log_decay)}
    initial = None if initial_state is None else (even(initial_state[0].mT).mT, even(initial_state[1]))
    o, final = flash_linear.run("chunk_gsa", tokens, {}, scale, segments, initial, want_final)
    return o[..., :V], None if final is None else (final[0][..., :K, :], final[1][..., :V])


BACKEND = Backend(run=slot_attention, kinds=("slots",), **flash_linear.DECLARED)
