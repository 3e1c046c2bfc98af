"""flash-linear-attention's chunk kernels for the linear recurrence.

    identity   chunk_simple_gla
    constant   chunk_simple_gla(g_gamma): no gradient of the decay, no final state, see `kinds.linear_kind`
    scalar     chunk_simple_gla(g): a constant decay is spread over the tokens
    diagonal   chunk_gla
    bonus      chunk_rwkv6

chunk_simple_gla(g_gamma) gives NaN final states where a row or document ends with a short chunk, and ignores the
gradient of g_gamma; that is why such calls go by g.
"""

from typing import Any

from torch import Tensor

from torchlinearmoe.kernels import flash_linear
from torchlinearmoe.kernels.flash_linear import even, gate
from torchlinearmoe.kernels.linear.kinds import KINDS, linear_kind
from torchlinearmoe.kernels.operator import Backend, outside_graphs
from torchlinearmoe.segments import Segments


@outside_graphs
def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    segments: Segments,
    initial_state: Tensor | None,
    want_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `definition.linear_recurrence`."""
    K, V = q.shape[-1], v.shape[-1]
    q, k, v = even(q), even(k.to(q.dtype)), even(v.to(q.dtype))
    kind = linear_kind(log_decay, bonus, want_final)
    tokens = {"q": q, "k": k, "v": v}
    fixed: dict[str, Any] = {}
    if kind == "identity":
        function = "chunk_simple_gla"
    elif kind == "constant":
        function, fixed["g_gamma"] = "chunk_simple_gla", gate(log_decay)
    elif kind == "scalar":
        decays = gate(log_decay)
        function, tokens["g"] = "chunk_simple_gla", decays if decays.dim() == 2 else decays.expand(q.shape[:2])
    elif kind == "diagonal":
        function, tokens["g"] = "chunk_gla", even(gate(log_decay))
    else:
        assert bonus is not None
        function = "chunk_rwkv6"
        tokens = {"r": q, "k": k, "v": v, "w": even(gate(log_decay))}
        fixed["u"] = even(bonus.float())
    initial = flash_linear.even_state(initial_state)
    o, final = flash_linear.run(function, tokens, fixed, scale, segments, initial, want_final)
    return flash_linear.without_final(o, final, K, V)


BACKEND = Backend(
    run=linear_recurrence,
    kinds=KINDS,
    defects=(flash_linear.gated_defect("scalar"), flash_linear.narrow_defect("identity", "constant")),
    **flash_linear.DECLARED,
)
