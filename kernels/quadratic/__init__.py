"""Quadratic attention: o_t = sum_{j <= t} f(q_t . k_j) v_j / (sum_{j <= t} f(q_t . k_j) + eps), a polynomial in the
place of exp.

Legend: T tokens of the stream, H heads, K query/key width, F features, V value width, N segments.
"""

from torch import Tensor

from torchlinearmoe.kernels.choose import choose
from torchlinearmoe.kernels.operator import Budget, Call, Operator
from torchlinearmoe.kernels.quadratic.features import KINDS, feature_width
from torchlinearmoe.kernels.states import check_segments, check_shape, checked_state, facts_of
from torchlinearmoe.segments import Segments

OPERATOR = Operator("quadratic", KINDS, key="model.kernel_backend")


def quadratic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segments: Segments,
    kind: str,
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    initial_state: Tensor | None = None,
    want_final: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Quadratic attention inside every segment.

    q, k: [T, H, K]; v: [T, H, V]; kind: "taylor", f(s) = 1 + scale s + (scale s)^2 / 2, or "square", f(s) =
    (scale s)^2; scale: positive, default K^-0.5; without `normalize` nothing is divided. initial_state:
    [N, H, F, V + 1] (V without `normalize`), F second-order features (`features.feature_width`). Returns o [T, H, V] in
    q's dtype and the final states (fp32, fp64 for fp64 inputs) or None.
    """
    T, H, K = q.shape
    V = v.shape[-1]
    check_segments(segments, T)
    check_shape("k", k, (T, H, K))
    check_shape("v", v, (T, H, V))
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r}, legal: {', '.join(KINDS)}")
    factor = K**-0.5 if scale is None else scale
    if factor <= 0:
        raise ValueError(f"scale: {factor}, legal: positive numbers")
    initial_state = checked_state(initial_state, (H, feature_width(kind, K), V + normalize), segments, q)
    facts = facts_of(segments, initial_state is not None, want_final)
    chosen = choose(OPERATOR, backend, Call(kind, q.device.type, q.dtype, K, **facts))
    return chosen.run(q, k, v, kind, factor, normalize, eps, segments, initial_state, want_final)


def quadratic_attention_flops(
    heads: int, key_dim: int, features: int, value_columns: int, chunk_size: int = 128
) -> float:
    """Matmul FLOPs a token of a forward pass; value columns count the normaliser's ones.

    Reads and writes of the state go through the features, scores inside a chunk through the keys themselves.
    """
    return heads * (4.0 * features * value_columns + chunk_size * (key_dim + value_columns))


def budget(kind: str, tokens: int, heads: int, key_dim: int, value_dim: int, itemsize: int = 2) -> Budget:
    """Of `tokens` tokens, normalised."""
    inputs = heads * itemsize * (2 * key_dim + value_dim)
    output = heads * itemsize * value_dim
    return Budget(
        flops=tokens * quadratic_attention_flops(heads, key_dim, feature_width(kind, key_dim), value_dim + 1),
        forward_bytes=tokens * (inputs + output),
        backward_bytes=tokens * (2 * inputs + output),
        saved_bytes=tokens * inputs,
        steps=max(1, (tokens // 128).bit_length()),
    )
