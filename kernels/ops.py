"""The operators that mixers call, and the one place that decides which backend computes them.

Layout [B, T, H, ...]. Packed documents: B == 1 with `cu_seqlens`, int32 [N + 1]; states are then per document,
[N, ...], else per row. `document_ids`, int [T] with a label per document, may stand beside it: an operator without
states in or out then reads only the ids, whose shape does not change from batch to batch. Log decays are natural logs
<= 0 and apply before the write; outputs read after it. States are fp32 (fp64 for fp64 inputs); gradients flow through
initial and final states.

Which backend computes a call is decided in `backends/choose.py`; `chosen_backends` tells.
"""

import torch
from torch import Tensor

from torchlinearmoe.errors import UserError
from torchlinearmoe.kernels import normalize
from torchlinearmoe.kernels.backends.call import States, delta_kind, linear_kind
from torchlinearmoe.kernels.backends.choose import choose, chosen_backends
from torchlinearmoe.kernels.backends.table import BACKENDS, Backend
from torchlinearmoe.kernels.chunked import convolution as chunked_convolution
from torchlinearmoe.kernels.chunked import token_shift as chunked_token_shift
from torchlinearmoe.kernels.quadratic_features import KINDS, feature_width

__all__ = [
    "chosen_backends",
    "delta_rule",
    "dplr_rule",
    "linear_recurrence",
    "quadratic_attention",
    "short_convolution",
    "slot_attention",
    "ssd",
    "token_shift",
]


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    bonus: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T and o_t = scale * q_t^T S_t.

    q, k: [B, T, H, K]; v: [B, T, H, V]; log_decay: None, [H], [B, T, H] or [B, T, H, K]; scale: default K^-0.5;
    bonus [H, K], with a decay per channel only: o_t = scale * q_t^T (S_{t-1} + diag(bonus) k_t v_t^T), as in RWKV6;
    initial_state: [N, H, K, V]. Returns o [B, T, H, V] in q's dtype and the final states [N, H, K, V] or None.
    """
    B, T, H, K = q.shape
    _check_shape("k", k, (B, T, H, K))
    _check_shape("v", v, (B, T, H, v.shape[-1]))
    if log_decay is not None and tuple(log_decay.shape) not in ((H,), (B, T, H), (B, T, H, K)):
        raise ValueError(f"log_decay: shape {tuple(log_decay.shape)}, legal: {(H,)}, {(B, T, H)}, {(B, T, H, K)}")
    if bonus is not None:
        _check_shape("bonus", bonus, (H, K))
        if log_decay is None or log_decay.dim() != 4:
            raise ValueError("bonus: needs log_decay per channel, [B, T, H, K]")
    states = _states(q, v, initial_state, output_final_state, cu_seqlens, document_ids)
    chosen = _choose(linear_kind(log_decay, bonus, output_final_state), backend, q)
    assert chosen.linear_recurrence is not None
    return chosen.linear_recurrence(q, k, v, log_decay, bonus, K**-0.5 if scale is None else scale, states)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    l2_norm: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """S' = diag(e^{g_t}) S_{t-1}; S_t = S' + beta_t k_t (v_t - S'^T k_t)^T; o_t = scale * q_t^T S_t.

    q, k: [B, T, H, K], divided by their length first with `l2_norm`; v: [B, T, HV, V], HV a multiple of H (value head
    h reads query and key head h // (HV // H)); beta: [B, T, HV], in [0, 2]; log_decay: None, [B, T, HV] or
    [B, T, HV, K]; scale: default K^-0.5; initial_state: [N, HV, K, V]. Returns o [B, T, HV, V] in q's dtype and the
    final states [N, HV, K, V] or None.
    """
    B, T, H, K = q.shape
    HV = v.shape[2]
    _check_shape("k", k, (B, T, H, K))
    _check_shape("v", v, (B, T, HV, v.shape[-1]))
    _check_shape("beta", beta, (B, T, HV))
    if HV % H:
        raise ValueError(f"v: {HV} value heads, legal: a multiple of the {H} query heads")
    if log_decay is not None and tuple(log_decay.shape) not in ((B, T, HV), (B, T, HV, K)):
        raise ValueError(f"log_decay: shape {tuple(log_decay.shape)}, legal: {(B, T, HV)}, {(B, T, HV, K)}")
    if l2_norm:
        q, k = normalize.l2_normalize(q), normalize.l2_normalize(k)
    states = _states(q, v, initial_state, output_final_state, cu_seqlens, document_ids)
    chosen = _choose(delta_kind(log_decay), backend, q)
    assert chosen.delta_rule is not None
    return chosen.delta_rule(q, k, v, beta, log_decay, K**-0.5 if scale is None else scale, states)


def dplr_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    lower_bound: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """S_t = diag(e^{g_t}) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T and o_t = scale * q_t^T S_t.

    q, k, a, b, log_decay: [B, T, H, K]; v: [B, T, H, V]; scale: default K^-0.5; initial_state: [N, H, K, V].
    lower_bound: a number below 0 under which the caller lets no log decay fall; fla's kernel then takes larger chunks.
    Returns o [B, T, H, V] in q's dtype and the final states [N, H, K, V] or None.
    """
    B, T, H, K = q.shape
    for name, x in (("k", k), ("a", a), ("b", b), ("log_decay", log_decay)):
        _check_shape(name, x, (B, T, H, K))
    _check_shape("v", v, (B, T, H, v.shape[-1]))
    if lower_bound is not None and lower_bound >= 0:
        raise ValueError(f"lower_bound: {lower_bound}, legal: None, numbers below 0")
    states = _states(q, v, initial_state, output_final_state, cu_seqlens, document_ids)
    chosen = _choose("dplr_rule", backend, q)
    assert chosen.dplr_rule is not None
    return chosen.dplr_rule(q, k, v, a, b, log_decay, lower_bound, K**-0.5 if scale is None else scale, states)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """S_t = e^{dt_t A} S_{t-1} + B_t (dt_t x_t)^T and y_t = C_t^T S_t: Mamba2 (Dao and Gu 2024, arXiv:2405.21060).

    The linear recurrence with a decay per token and head, in the arguments in which Mamba2's own kernels want it:
    x: [R, T, H, V] for R rows; dt: [R, T, H], >= 0, fp32; A: [H], <= 0, fp32; B, C: [R, T, G, K], G groups of heads
    (head h reads group h // (H // G)); initial_state: [N, H, K, V]. Returns y [R, T, H, V] in x's dtype and the final
    states [N, H, K, V] or None.
    """
    R, T, H, _ = x.shape
    G, K = B.shape[-2:]
    _check_shape("dt", dt, (R, T, H))
    _check_shape("A", A, (H,))
    _check_shape("B", B, (R, T, G, K))
    _check_shape("C", C, (R, T, G, K))
    if H % G:
        raise ValueError(f"B, C: {G} groups, legal: a divisor of the {H} heads")
    states = _states(C, x, initial_state, output_final_state, cu_seqlens, document_ids)
    chosen = _choose("ssd", backend, C)
    if chosen.ssd is not None:
        return chosen.ssd(x, dt, A, B, C, states)
    assert chosen.linear_recurrence is not None
    q, k = (part.repeat_interleave(H // G, 2) for part in (C, B))
    v = (x * dt.unsqueeze(-1)).to(x.dtype)
    return chosen.linear_recurrence(q, k, v, dt * A, None, 1.0, states)


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Slots K_t = K_{t-1} diag(e^{g_t}) + k_t s_t^T and V_t = diag(e^{g_t}) V_{t-1} + s_t v_t^T, read by softmax:
    o_t = V_t^T softmax(scale * K_t^T q_t).

    q, k: [B, T, H, K]; v: [B, T, H, V]; s, log_decay: [B, T, H, S] for S slots; scale: default K^-0.5;
    initial_state: slot keys [N, H, K, S] and slot values [N, H, S, V]. Returns o [B, T, H, V] in q's dtype and the
    final slot keys and values or None.
    """
    B, T, H, K = q.shape
    _check_shape("k", k, (B, T, H, K))
    _check_shape("v", v, (B, T, H, v.shape[-1]))
    _check_shape("s", s, (B, T, H, s.shape[-1]))
    _check_shape("log_decay", log_decay, tuple(s.shape))
    first_keys, first_values = (None, None) if initial_state is None else initial_state
    keys = _states(q, s, first_keys, output_final_state, cu_seqlens, document_ids)
    values = _states(s, v, first_values, output_final_state, cu_seqlens, document_ids)
    chosen = _choose("slot_attention", backend, q)
    assert chosen.slot_attention is not None
    return chosen.slot_attention(q, k, v, s, log_decay, K**-0.5 if scale is None else scale, keys, values)


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y_t = activation(bias + sum_j weight[:, j] x_{t - (W - 1) + j}), causal and depthwise.

    x: [B, T, D]; weight: [D, W]; bias: [D]; activation: None or "silu"; initial_state: the W - 1 inputs before each
    document, oldest first, [N, W - 1, D]. Returns y [B, T, D] and the last W - 1 inputs [N, W - 1, D] or None, both in
    x's dtype.
    """
    B, _, D = x.shape
    W = weight.shape[-1]
    _check_shape("weight", weight, (D, W))
    if bias is not None:
        _check_shape("bias", bias, (D,))
    if activation not in (None, "silu"):
        raise ValueError(f"activation: {activation!r}, legal: None, 'silu'")
    with_states = initial_state is not None or output_final_state
    N = _count_documents(B, cu_seqlens, document_ids, with_states)
    if initial_state is not None:
        _check_shape("initial_state", initial_state, (N, W - 1, D))
    return chunked_convolution.short_convolution(
        x,
        weight,
        bias,
        activation=activation,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        document_ids=document_ids,
    )


def quadratic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kind: str,
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """o_t = sum_{j <= t} f(q_t . k_j) v_j / (sum_{j <= t} f(q_t . k_j) + eps), a polynomial in the place of exp.

    q, k: [B, T, H, K]; v: [B, T, H, V]; kind: "taylor", f(s) = 1 + scale s + (scale s)^2 / 2, or "square",
    f(s) = (scale s)^2; scale: positive, default K^-0.5; without `normalize` nothing is divided. initial_state:
    [N, H, F, V + 1] (V without `normalize`), F second-order features (`quadratic_features.feature_width`). Returns
    o [B, T, H, V] in q's dtype and the final states or None.
    """
    B, T, H, K = q.shape
    _check_shape("k", k, (B, T, H, K))
    _check_shape("v", v, (B, T, H, v.shape[-1]))
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r}, legal: {', '.join(KINDS)}")
    factor = K**-0.5 if scale is None else scale
    if factor <= 0:
        raise ValueError(f"scale: {factor}, legal: positive numbers")
    entry = (H, feature_width(kind, K), v.shape[-1] + normalize)
    states = _states(q, v, initial_state, output_final_state, cu_seqlens, document_ids, entry)
    chosen = _choose("quadratic_attention", backend, q)
    assert chosen.quadratic_attention is not None
    return chosen.quadratic_attention(q, k, v, kind, factor, normalize, eps, states)


def token_shift(
    x: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y_t = x_{t-1} inside the document. x: [B, T, D]; initial_state: the input before each document, [N, 1, D].

    Returns y [B, T, D] and the last input of each document [N, 1, D] or None, both in x's dtype.
    """
    with_states = initial_state is not None or output_final_state
    N = _count_documents(x.shape[0], cu_seqlens, document_ids, with_states)
    if document_ids is not None:
        _check_shape("document_ids", document_ids, (x.shape[1],))
    if initial_state is not None:
        _check_shape("initial_state", initial_state, (N, 1, x.shape[2]))
    return chunked_token_shift.token_shift(
        x,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        document_ids=document_ids,
    )


def _choose(operator: str, backend: str, q: Tensor) -> Backend:
    name, refusal = choose(
        operator,
        backend,
        q.device.type,
        q.dtype,
        q.shape[-1],
        torch.is_grad_enabled(),
        torch.compiler.is_compiling(),
    )
    if refusal:
        raise UserError(refusal)
    return BACKENDS[name]


def _states(
    q: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    document_ids: Tensor | None,
    entry: tuple[int, int, int] | None = None,
) -> States:
    B, T, _, K = q.shape
    if document_ids is not None:
        _check_shape("document_ids", document_ids, (T,))
    N = _count_documents(B, cu_seqlens, document_ids, initial_state is not None or output_final_state)
    if initial_state is not None:
        _check_shape("initial_state", initial_state, (N, *(entry or (v.shape[2], K, v.shape[3]))))
        initial_state = initial_state.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    return States(initial_state, output_final_state, cu_seqlens, document_ids)


def _count_documents(B: int, cu_seqlens: Tensor | None, document_ids: Tensor | None, with_states: bool) -> int:
    if cu_seqlens is None and document_ids is None:
        return B
    if B != 1:
        raise ValueError(f"cu_seqlens, document_ids: packed documents need a batch of 1, got {B}")
    if cu_seqlens is not None:
        return cu_seqlens.shape[0] - 1 if with_states else 0
    if with_states:
        raise ValueError("document_ids: states in or out need cu_seqlens beside it")
    return 0


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(x.shape)}, legal: {shape}")
