"""State space duality: S_t = e^{dt_t A} S_{t-1} + B_t (dt_t x_t)^T and y_t = C_t^T S_t: Mamba2 (Dao and Gu 2024,
arXiv:2405.21060).

The linear recurrence with a decay per token and head, in the arguments in which Mamba2's own kernels want it.

Legend: T tokens of the stream, H heads, G groups of heads, K state dim, V head dim, N segments.
"""

from torch import Tensor

from torchlinearmoe.kernels.choose import choose
from torchlinearmoe.kernels.linear import linear_recurrence_flops
from torchlinearmoe.kernels.operator import Budget, Call, Operator
from torchlinearmoe.kernels.states import check_segments, check_shape, checked_state, facts_of
from torchlinearmoe.segments import Segments

OPERATOR = Operator("ssd", ("ssd",), key="model.kernel_backend")


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    segments: Segments,
    initial_state: Tensor | None = None,
    want_final: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The recurrence over every segment.

    x: [T, H, V]; dt: [T, H], >= 0, fp32; A: [H], <= 0, fp32; B, C: [T, G, K] (head h reads group h // (H // G));
    initial_state: [N, H, K, V]. Returns y [T, H, V] in x's dtype and the final states [N, H, K, V] (fp32, fp64 for fp64
    inputs) or None. Gradients flow through both states.
    """
    T, H, V = x.shape
    G, K = B.shape[-2:]
    check_segments(segments, T)
    check_shape("dt", dt, (T, H))
    check_shape("A", A, (H,))
    check_shape("B", B, (T, G, K))
    check_shape("C", C, (T, G, K))
    if H % G:
        raise ValueError(f"B, C: {G} groups, legal: a divisor of the {H} heads")
    initial_state = checked_state(initial_state, (H, K, V), segments, x)
    facts = facts_of(segments, initial_state is not None, want_final)
    chosen = choose(OPERATOR, backend, Call("ssd", x.device.type, x.dtype, K, **facts))
    return chosen.run(x, dt, A, B, C, segments, initial_state, want_final)


def budget(tokens: int, heads: int, groups: int, state_dim: int, head_dim: int, itemsize: int = 2) -> Budget:
    """Of `tokens` tokens; dt is float32."""
    inputs = itemsize * (heads * head_dim + 2 * groups * state_dim) + 4 * heads
    output = itemsize * heads * head_dim
    return Budget(
        flops=tokens * linear_recurrence_flops(heads, state_dim, head_dim),
        forward_bytes=tokens * (inputs + output),
        backward_bytes=tokens * (2 * inputs + output),
        saved_bytes=tokens * inputs,
        steps=max(1, (tokens // 64).bit_length()),
    )
