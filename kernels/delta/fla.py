"""flash-linear-attention's chunk kernels for the delta rule.

plain      chunk_delta_rule: heads repeated; in float32, which it refuses, chunk_gated_delta_rule
gated      chunk_gated_delta_rule: value heads may outnumber key heads
channels   chunk_kda: the same
"""

import torch
from torch import Tensor

from torchlinearmoe.kernels import flash_linear
from torchlinearmoe.kernels.delta.kinds import KINDS, delta_kind
from torchlinearmoe.kernels.flash_linear import even, gate
from torchlinearmoe.kernels.operator import Backend, outside_graphs
from torchlinearmoe.segments import Segments


@outside_graphs
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    segments: Segments,
    initial_state: Tensor | None,
    want_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `definition.delta_rule`."""
    K, V = q.shape[-1], v.shape[-1]
    q, k, v = even(q), even(k.to(q.dtype)), even(v.to(q.dtype))
    tokens = {"q": q, "k": k, "v": v, "beta": beta.float()}
    kind = delta_kind(log_decay)
    if kind == "channels":
        function, tokens["g"] = "chunk_kda", even(gate(log_decay))
    elif kind == "plain" and q.dtype != torch.float32:
        function, groups = "chunk_delta_rule", v.shape[1] // q.shape[1]
        if groups > 1:
            tokens["q"], tokens["k"] = q.repeat_interleave(groups, 1), k.repeat_interleave(groups, 1)
    else:
        function = "chunk_gated_delta_rule"
        tokens["g"] = torch.zeros_like(tokens["beta"]) if log_decay is None else gate(log_decay)
    initial = flash_linear.even_state(initial_state)
    o, final = flash_linear.run(function, tokens, {}, scale, segments, initial, want_final)
    return flash_linear.without_final(o, final, K, V)


BACKEND = Backend(
    run=delta_rule,
    kinds=KINDS,
    refuses=flash_linear.at_most_256_channels,
    defects=(
        flash_linear.gated_defect("gated"),
        flash_linear.gated_defect("plain", dtypes=(torch.float32,)),
        flash_linear.narrow_defect("plain", channels=63),  # a tile of 64
    ),
    **flash_linear.DECLARED,
)
