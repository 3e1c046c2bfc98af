"""Diagonal plus low rank transitions: S_t = diag(e^{g_t}) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T.

Legend: T tokens of the stream, H heads, K/V key/value head dim, N segments.
"""

from torch import Tensor

from torchlinearmoe.kernels.choose import choose
from torchlinearmoe.kernels.linear import linear_recurrence_flops
from torchlinearmoe.kernels.operator import Budget, Call, Operator
from torchlinearmoe.kernels.states import check_segments, check_shape, checked_state, facts_of
from torchlinearmoe.segments import Segments

OPERATOR = Operator("dplr", ("dplr",), key="model.kernel_backend")


def dplr_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    *,
    segments: Segments,
    scale: float | None = None,
    lower_bound: float | None = None,
    initial_state: Tensor | None = None,
    want_final: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The recurrence over every segment, read by o_t = scale * q_t^T S_t.

    q, k, a, b, log_decay: [T, H, K]; v: [T, H, V]; scale: default K^-0.5; initial_state: [N, H, K, V]. lower_bound: a
    number below 0 under which the caller lets no log decay fall; fla's kernel then takes larger chunks. Returns
    o [T, H, V] in q's dtype and the final states [N, H, K, V] (fp32, fp64 for fp64 inputs) or None.
    """
    T, H, K = q.shape
    V = v.shape[-1]
    check_segments(segments, T)
    for name, x in (("k", k), ("a", a), ("b", b), ("log_decay", log_decay)):
        check_shape(name, x, (T, H, K))
    check_shape("v", v, (T, H, V))
    if lower_bound is not None and lower_bound >= 0:
        raise ValueError(f"lower_bound: {lower_bound}, legal: None, numbers below 0")
    initial_state = checked_state(initial_state, (H, K, V), segments, q)
    facts = facts_of(segments, initial_state is not None, want_final)
    chosen = choose(OPERATOR, backend, Call("dplr", q.device.type, q.dtype, K, **facts))
    factor = K**-0.5 if scale is None else scale
    return chosen.run(q, k, v, a, b, log_decay, lower_bound, factor, segments, initial_state, want_final)


def dplr_rule_flops(heads: int, key_dim: int, value_dim: int, chunk_size: int = 64) -> float:
    """Matmul FLOPs a token of a forward pass.

    Beside the linear recurrence: 2KV to read the entering state along a, 2KV to write along b; three more kinds of
    scores (CK each), a's reads of the values and the writes along b (CV each), the triangular solve for K + V columns.
    """
    extra = 4.0 * key_dim * value_dim + chunk_size * (4 * key_dim + 3 * value_dim)
    return linear_recurrence_flops(heads, key_dim, value_dim, chunk_size) + heads * extra


def budget(kind: str, tokens: int, heads: int, key_dim: int, value_dim: int, itemsize: int = 2) -> Budget:
    """Of `tokens` tokens; decays are float32."""
    inputs = heads * (itemsize * (4 * key_dim + value_dim) + 4 * key_dim)
    output = heads * itemsize * value_dim
    return Budget(
        flops=tokens * dplr_rule_flops(heads, key_dim, value_dim),
        forward_bytes=tokens * (inputs + output),
        backward_bytes=tokens * (2 * inputs + output),
        saved_bytes=tokens * inputs,
        steps=max(1, (tokens // 64).bit_length()),
    )
