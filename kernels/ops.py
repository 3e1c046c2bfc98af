"""The operators that mixers call, and the one place that decides which backend computes them.

Layout [B, T, H, ...]. Packed documents: B == 1 with `cu_seqlens`, int32 [N + 1]; states are then per document,
[N, ...], else per row. `document_ids`, int [T] with a label per document, may stand beside it: an operator without
states in or out then reads only the ids, whose shape does not change from batch to batch. Log decays are natural logs
<= 0 and apply before the write; outputs read after it. States are fp32 (fp64 for fp64 inputs); gradients flow through
initial and final states.

A backend is an entry of `BACKENDS`. "auto" takes the first entry that offers itself for the call, and the log says once
per operator which one that was.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlinearmoe.kernels import normalize
from torchlinearmoe.kernels.chunked import convolution as chunked_convolution
from torchlinearmoe.kernels.chunked import delta as chunked_delta
from torchlinearmoe.kernels.chunked import gsa as chunked_gsa
from torchlinearmoe.kernels.chunked import quadratic as chunked_quadratic
from torchlinearmoe.kernels.chunked import token_shift as chunked_token_shift
from torchlinearmoe.kernels.chunked.diagonal import linear_diagonal
from torchlinearmoe.kernels.chunked.layout import make_layout
from torchlinearmoe.kernels.chunked.scalar import linear_scalar
from torchlinearmoe.kernels.quadratic_features import KINDS, feature_width
from torchlinearmoe.kernels.reference import delta as reference_delta
from torchlinearmoe.kernels.reference import gsa as reference_gsa
from torchlinearmoe.kernels.reference import linear as reference_linear
from torchlinearmoe.kernels.reference import quadratic as reference_quadratic

logger = logging.getLogger("torchlinearmoe.kernels")

CHUNK_SIZE = 64


@dataclass(frozen=True)
class States:
    """What a call says about states and documents, the same for every operator."""

    initial: Tensor | None
    want_final: bool
    cu_seqlens: Tensor | None
    document_ids: Tensor | None


def _torch_quadratic(q, k, v, kind, scale, normalize, eps, states: States):
    layout = _layout(q, states, chunked_quadratic.CHUNK_SIZE)
    return chunked_quadratic.quadratic_attention(
        q, k, v, kind, scale, normalize, eps, states.initial, states.want_final, states.cu_seqlens, layout
    )


def _torch_slots(q, k, v, s, log_decay, scale, keys: States, values: States):
    layout = _layout(q, keys)
    return chunked_gsa.slot_attention(
        q, k, v, s, log_decay, scale, keys.initial, values.initial, keys.want_final, layout
    )


@dataclass(frozen=True)
class Backend:
    """One way to compute the operators. Its functions take plain tensors, every default resolved."""

    linear_recurrence: Callable[..., tuple[Tensor, Tensor | None]]
    """(q, k, v, log_decay, bonus, scale, states)"""
    delta_rule: Callable[..., tuple[Tensor, Tensor | None]]
    """(q, k, v, beta, log_decay, scale, states)"""
    offers: Callable[[str, Tensor], bool]
    """(operator, q): whether "auto" may choose this backend for the call, judged by device, dtype and versions."""
    slot_attention: Callable[..., tuple[Tensor, tuple[Tensor, Tensor] | None]] = _torch_slots
    """(q, k, v, s, log_decay, scale, states of the slot keys, states of the slot values); without a form of its own a
    backend takes the chunk-parallel one."""
    quadratic_attention: Callable[..., tuple[Tensor, Tensor | None]] = _torch_quadratic
    """(q, k, v, kind, scale, normalize, eps, states); the same holds."""


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
    chosen = _choose("linear_recurrence", backend, q)
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
    """S' = e^{g_t} S_{t-1}; S_t = S' + beta_t k_t (v_t - S'^T k_t)^T; o_t = scale * q_t^T S_t.

    q, k: [B, T, H, K], divided by their length first with `l2_norm`; v: [B, T, HV, V], HV a multiple of H (value head
    h reads query and key head h // (HV // H)); beta: [B, T, HV], in [0, 2]; log_decay: None or [B, T, HV];
    scale: default K^-0.5; initial_state: [N, HV, K, V]. Returns o [B, T, HV, V] in q's dtype and the final states
    [N, HV, K, V] or None.
    """
    B, T, H, K = q.shape
    HV = v.shape[2]
    _check_shape("k", k, (B, T, H, K))
    _check_shape("v", v, (B, T, HV, v.shape[-1]))
    _check_shape("beta", beta, (B, T, HV))
    if HV % H:
        raise ValueError(f"v: {HV} value heads, legal: a multiple of the {H} query heads")
    if log_decay is not None:
        _check_shape("log_decay", log_decay, (B, T, HV))
    if l2_norm:
        q, k = normalize.l2_normalize(q), normalize.l2_normalize(k)
    states = _states(q, v, initial_state, output_final_state, cu_seqlens, document_ids)
    chosen = _choose("delta_rule", backend, q)
    return chosen.delta_rule(q, k, v, beta, log_decay, K**-0.5 if scale is None else scale, states)


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


def _torch_linear(q, k, v, log_decay, bonus, scale, states: States):
    layout = _layout(q, states)
    if log_decay is not None and log_decay.dim() == 4:
        return linear_diagonal(q, k, v, log_decay, bonus, scale, states.initial, states.want_final, layout)
    return linear_scalar(q, k, v, log_decay, scale, states.initial, states.want_final, layout)


def _torch_delta(q, k, v, beta, log_decay, scale, states: States):
    layout = _layout(q, states)
    return chunked_delta.delta_rule(q, k, v, beta, log_decay, scale, states.initial, states.want_final, layout)


def _layout(q: Tensor, states: States, chunk_size: int = CHUNK_SIZE):
    with_states = states.initial is not None or states.want_final
    return make_layout(q.shape[0], q.shape[1], chunk_size, states.cu_seqlens, states.document_ids, with_states)


def _reference_linear(q, k, v, log_decay, bonus, scale, states: States):
    return reference_linear.linear_recurrence(
        q, k, v, log_decay, bonus=bonus, scale=scale, **_reference_states(states, q)
    )


def _reference_delta(q, k, v, beta, log_decay, scale, states: States):
    return reference_delta.delta_rule(q, k, v, beta, log_decay, scale=scale, **_reference_states(states, q))


def _reference_quadratic(q, k, v, kind, scale, normalize, eps, states: States):
    options = _reference_states(states, q)
    return reference_quadratic.quadratic_attention(
        q, k, v, kind=kind, scale=scale, normalize=normalize, eps=eps, **options
    )


def _reference_slots(q, k, v, s, log_decay, scale, keys: States, values: States):
    options = _reference_states(keys, q)
    if keys.initial is not None:
        options["initial_state"] = (keys.initial, values.initial)
    return reference_gsa.slot_attention(q, k, v, s, log_decay, scale=scale, **options)


def _reference_states(states: States, q: Tensor) -> dict:
    cu_seqlens = states.cu_seqlens
    if cu_seqlens is None and states.document_ids is not None:
        lengths = torch.unique_consecutive(states.document_ids, return_counts=True)[1]
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return {"initial_state": states.initial, "output_final_state": states.want_final, "cu_seqlens": cu_seqlens}


BACKENDS: dict[str, Backend] = {
    "torch": Backend(_torch_linear, _torch_delta, offers=lambda operator, q: True),
    "reference": Backend(
        _reference_linear,
        _reference_delta,
        offers=lambda operator, q: False,
        slot_attention=_reference_slots,
        quadratic_attention=_reference_quadratic,
    ),
}
_announced: set[tuple[str, str]] = set()


def _choose(operator: str, backend: str, q: Tensor) -> Backend:
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"backend: {backend!r}, legal: {', '.join(['auto', *BACKENDS])}")
        return BACKENDS[backend]
    name = next(name for name, candidate in BACKENDS.items() if candidate.offers(operator, q))
    if not torch.compiler.is_compiling() and (operator, name) not in _announced:
        _announced.add((operator, name))
        logger.info("%s runs on the %s backend", operator, name)
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
