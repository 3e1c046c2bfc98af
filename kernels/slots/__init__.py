"""Gated slot attention: slots K_t = K_{t-1} diag(e^{g_t}) + k_t s_t^T and V_t = diag(e^{g_t}) V_{t-1} + s_t v_t^T, read
by softmax, o_t = V_t^T softmax(scale * K_t^T q_t).

Legend: T tokens of the stream, H heads, K/V key/value head dim, S slots, N segments.
"""

from torch import Tensor

from torchlinearmoe.kernels.choose import choose
from torchlinearmoe.kernels.linear import linear_recurrence_flops
from torchlinearmoe.kernels.operator import Budget, Call, Operator
from torchlinearmoe.kernels.slots.kinds import KINDS, slot_kind
from torchlinearmoe.kernels.states import check_segments, check_shape, checked_state, facts_of
from torchlinearmoe.segments import Segments

OPERATOR = Operator("slots", KINDS, key="model.kernel_backend")


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    log_decay: Tensor,
    *,
    segments: Segments,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    want_final: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Slot attention over every segment.

    q, k: [T, H, K]; v: [T, H, V]; s, log_decay: [T, H, S]; scale: default K^-0.5; initial_state: slot keys [N, H, K, S]
    and slot values [N, H, S, V]. Returns o [T, H, V] in q's dtype and the final slot keys and values or None.
    """
    T, H, K = q.shape
    S, V = s.shape[-1], v.shape[-1]
    check_segments(segments, T)
    check_shape("k", k, (T, H, K))
    check_shape("v", v, (T, H, V))
    check_shape("s", s, (T, H, S))
    check_shape("log_decay", log_decay, (T, H, S))
    if initial_state is not None:
        keys = checked_state(initial_state[0], (H, K, S), segments, q)
        values = checked_state(initial_state[1], (H, S, V), segments, q)
        assert keys is not None and values is not None
        initial_state = (keys, values)
    facts = facts_of(segments, initial_state is not None, want_final)
    chosen = choose(OPERATOR, backend, Call(slot_kind(S), q.device.type, q.dtype, K, **facts))
    factor = K**-0.5 if scale is None else scale
    return chosen.run(q, k, v, s, log_decay, factor, segments, initial_state, want_final)


def slot_attention_flops(heads: int, key_dim: int, value_dim: int, slots: int, chunk_size: int = 64) -> float:
    """Matmul FLOPs a token of a forward pass: a linear recurrence into the slot keys, and one out of the values."""
    into = linear_recurrence_flops(heads, key_dim, slots, chunk_size)
    return into + linear_recurrence_flops(heads, slots, value_dim, chunk_size)


def budget(tokens: int, heads: int, key_dim: int, value_dim: int, slots: int, itemsize: int = 2) -> Budget:
    """Of `tokens` tokens; decays are float32."""
    inputs = heads * (itemsize * (2 * key_dim + value_dim + slots) + 4 * slots)
    output = heads * itemsize * value_dim
    return Budget(
        flops=tokens * slot_attention_flops(heads, key_dim, value_dim, slots),
        forward_bytes=tokens * (inputs + output),
        backward_bytes=tokens * (2 * inputs + output),
        saved_bytes=tokens * inputs,
        steps=max(1, (tokens // 64).bit_length()),
    )
