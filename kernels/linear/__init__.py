"""The linear recurrence: S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T, o_t = scale * q_t^T S_t.

Legend: T tokens of the stream, H heads, K/V key/value head dim, N segments, C tokens of a chunk.
"""

from torch import Tensor

from torchlinearmoe.kernels.choose import choose
from torchlinearmoe.kernels.linear.kinds import KINDS, linear_kind
from torchlinearmoe.kernels.operator import Budget, Call, Operator
from torchlinearmoe.kernels.states import check_segments, check_shape, checked_state, facts_of
from torchlinearmoe.segments import Segments

OPERATOR = Operator("linear", KINDS, key="model.kernel_backend")


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    segments: Segments,
    scale: float | None = None,
    bonus: Tensor | None = None,
    initial_state: Tensor | None = None,
    want_final: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The recurrence over every segment.

    q, k: [T, H, K]; v: [T, H, V]; log_decay (natural log, <= 0, before the write): None, [H], [T, H] or [T, H, K];
    scale: default K^-0.5; bonus [H, K], with a decay per channel only: o_t = scale * q_t^T (S_{t-1} + diag(bonus)
    k_t v_t^T), as in RWKV6; initial_state: [N, H, K, V]. Returns o [T, H, V] in q's dtype and the final states
    [N, H, K, V] (fp32, fp64 for fp64 inputs) or None. Gradients flow through both states.
    """
    T, H, K = q.shape
    V = v.shape[-1]
    check_segments(segments, T)
    check_shape("k", k, (T, H, K))
    check_shape("v", v, (T, H, V))
    if log_decay is not None and tuple(log_decay.shape) not in ((H,), (T, H), (T, H, K)):
        raise ValueError(f"log_decay: shape {tuple(log_decay.shape)}, legal: {(H,)}, {(T, H)}, {(T, H, K)}")
    if bonus is not None:
        check_shape("bonus", bonus, (H, K))
        if log_decay is None or log_decay.dim() != 3:
            raise ValueError("bonus: needs log_decay per channel, [T, H, K]")
    initial_state = checked_state(initial_state, (H, K, V), segments, q)
    facts = facts_of(segments, initial_state is not None, want_final)
    call = Call(linear_kind(log_decay, bonus, want_final), q.device.type, q.dtype, K, **facts)
    chosen = choose(OPERATOR, backend, call)
    factor = K**-0.5 if scale is None else scale
    return chosen.run(q, k, v, log_decay, bonus, factor, segments, initial_state, want_final)


def linear_recurrence_flops(heads: int, key_dim: int, value_dim: int, chunk_size: int = 64) -> float:
    """Matmul FLOPs a token of a forward pass, the same for every kind of decay.

    2KV to write the state, 2KV to read it, and C/2 earlier tokens to score (2K each) and to add up (2V each): the work
    that a chunk-parallel form cannot do without. Masks, and the scan over chunks (less than 1 / C), do not count.
    """
    return heads * (4.0 * key_dim * value_dim + chunk_size * (key_dim + value_dim))


def budget(kind: str, tokens: int, heads: int, key_dim: int, value_dim: int, itemsize: int = 2) -> Budget:
    """Of `tokens` tokens; decays are float32. Forward reads q, k, v and decays and writes o; backward reads all of them
    and the gradient of o and writes four gradients."""
    decays = {"identity": 0, "constant": 0, "scalar": 1}.get(kind, key_dim)
    inputs = heads * (itemsize * (2 * key_dim + value_dim) + 4 * decays)
    output = heads * itemsize * value_dim
    return Budget(
        flops=tokens * linear_recurrence_flops(heads, key_dim, value_dim),
        forward_bytes=tokens * (inputs + output),
        backward_bytes=tokens * (2 * inputs + output),
        saved_bytes=tokens * inputs,
        steps=max(1, (tokens // 64).bit_length()),
    )
