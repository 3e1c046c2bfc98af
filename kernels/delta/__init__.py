"""The delta rule: S' = diag(e^{g_t}) S_{t-1}; S_t = S' + beta_t k_t (v_t - S'^T k_t)^T; o_t = scale * q_t^T S_t.

Legend: T tokens of the stream, H query/key heads, HV value heads, K/V key/value head dim, N segments.
"""

import torch
from torch import Tensor

from torchlinearmoe.kernels.choose import choose
from torchlinearmoe.kernels.chunk_table import CHUNK
from torchlinearmoe.kernels.delta.kinds import KINDS, delta_kind
from torchlinearmoe.kernels.linear import linear_recurrence_flops
from torchlinearmoe.kernels.operator import Budget, Call, Operator
from torchlinearmoe.kernels.states import check_segments, check_shape, checked_state, facts_of
from torchlinearmoe.precision import in_float32
from torchlinearmoe.segments import Segments

OPERATOR = Operator("delta", KINDS, key="model.kernel_backend")


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    segments: Segments,
    scale: float | None = None,
    l2_norm: bool = False,
    initial_state: Tensor | None = None,
    want_final: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The delta rule over every segment.

    q, k: [T, H, K], divided by their length first with `l2_norm`; v: [T, HV, V], HV a multiple of H (value head h reads
    query and key head h // (HV // H)); beta: [T, HV], in [0, 2]; log_decay: None, [T, HV] or [T, HV, K]; scale: default
    K^-0.5; initial_state: [N, HV, K, V]. Returns o [T, HV, V] in q's dtype and the final states [N, HV, K, V] (fp32,
    fp64 for fp64 inputs) or None. Gradients flow through both states.
    """
    T, H, K = q.shape
    HV, V = v.shape[-2:]
    check_segments(segments, T)
    check_shape("k", k, (T, H, K))
    check_shape("v", v, (T, HV, V))
    check_shape("beta", beta, (T, HV))
    if HV % H:
        raise ValueError(f"v: {HV} value heads, legal: a multiple of the {H} query heads")
    if log_decay is not None and tuple(log_decay.shape) not in ((T, HV), (T, HV, K)):
        raise ValueError(f"log_decay: shape {tuple(log_decay.shape)}, legal: {(T, HV)}, {(T, HV, K)}")
    if l2_norm:
        q, k = l2_normalize(q), l2_normalize(k)
    initial_state = checked_state(initial_state, (HV, K, V), segments, q)
    facts = facts_of(segments, initial_state is not None, want_final)
    chosen = choose(OPERATOR, backend, Call(delta_kind(log_decay), q.device.type, q.dtype, K, **facts))
    factor = K**-0.5 if scale is None else scale
    return chosen.run(q, k, v, beta, log_decay, factor, segments, initial_state, want_final)


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(|x|^2 + eps) over the last dim, computed in fp32 (fp64 for fp64) and returned in x's dtype."""
    wide = in_float32(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def delta_rule_flops(value_heads: int, key_dim: int, value_dim: int, chunk_size: int = 64) -> float:
    """Matmul FLOPs a token of a forward pass, the same for every kind of gate.

    Beside the linear recurrence: 2KV to apply the erased part to the entering state; the keys' overlaps (CK), the
    triangular solve for K + V columns (C(K + V)).
    """
    extra = 2.0 * key_dim * value_dim + chunk_size * (2 * key_dim + value_dim)
    return linear_recurrence_flops(value_heads, key_dim, value_dim, chunk_size) + value_heads * extra


def budget(kind: str, tokens: int, heads: int, key_dim: int, value_dim: int, itemsize: int = 2) -> Budget:
    """Of `tokens` tokens and as many value heads as query heads; beta and gates are float32."""
    gates = {"plain": 0, "gated": 1, "channels": key_dim}[kind]
    inputs = heads * (itemsize * (2 * key_dim + value_dim) + 4 * (gates + 1))
    output = heads * itemsize * value_dim
    return Budget(
        flops=tokens * delta_rule_flops(heads, key_dim, value_dim),
        forward_bytes=tokens * (inputs + output),
        backward_bytes=tokens * (2 * inputs + output),
        saved_bytes=tokens * (inputs + heads * CHUNK * (4 + itemsize)),
        steps=max(1, (tokens // 64).bit_length()),
    )
