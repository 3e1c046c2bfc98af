"""The one entry of every recurrence: what is before the tokens (`past`) decides how it is computed.

Documents that start empty, documents that go on from a state or from other ranks, and single tokens give the same
numbers. Every entry takes the state that goes in, None for an empty one, and gives the output and the state that comes
out, None where none went in.

Shapes: T tokens, N documents, H heads, G heads of the state (each read by H / G neighbouring query heads), K and V key
and value width of a head, S slots.
"""

from __future__ import annotations

from torch import Tensor

from torchlinearmoe.kernels.delta import delta_rule as delta_kernel
from torchlinearmoe.kernels.delta import l2_normalize
from torchlinearmoe.kernels.dplr import dplr_rule as dplr_kernel
from torchlinearmoe.kernels.heads import repeat_heads, same_heads
from torchlinearmoe.kernels.linear import linear_recurrence as linear_kernel
from torchlinearmoe.kernels.quadratic import quadratic_attention as quadratic_kernel
from torchlinearmoe.kernels.slots import slot_attention as slot_kernel
from torchlinearmoe.kernels.ssd import ssd as ssd_kernel
from torchlinearmoe.kernels.ssd.lowered import as_recurrence
from torchlinearmoe.layers.past import Past, Spanned
from torchlinearmoe.mixers import spanned

Result = tuple[Tensor, Tensor | None]


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    past: Past,
    state: Tensor | None,
    *,
    scale: float,
    bonus: Tensor | None = None,
    backend: str,
) -> Result:
    """`kernels.linear`, [T, H, V] in q's type.

    q: [T, H, K]; k: [T, G, K]; v: [T, G, V]; log_decay: None, [H], [T, G] or [T, G, K]; any of them may have fewer
    heads, each then stands for neighbouring ones. state: [N, G, K, V].
    """
    if isinstance(past, Spanned):
        return spanned.linear_recurrence(q, k, v, log_decay, past, scale=scale, bonus=bonus, backend=backend), None
    q, k, v, log_decay = same_heads(q, k, v, log_decay)
    times = 1 if state is None else q.shape[1] // state.shape[1]
    o, after = linear_kernel(
        q,
        k,
        v,
        log_decay,
        segments=past.segments,
        scale=scale,
        bonus=bonus,
        initial_state=None if state is None else repeat_heads(state, times),
        want_final=state is not None,
        backend=backend,
    )
    return o, None if after is None else after[:, ::times]


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, past: Past, state: Tensor | None, *, backend: str
) -> Result:
    """`kernels.ssd`, [T, H, V] in x's type.

    x: [T, H, V]; dt: [T, H]; A: [H]; B, C: [T, G, K]. state: [N, H, K, V].
    """
    if isinstance(past, Spanned):
        q, k, v, log_decay = as_recurrence(x, dt, A, B, C)
        return spanned.linear_recurrence(q, k, v, log_decay, past, scale=1.0, bonus=None, backend=backend), None
    return ssd_kernel(
        x,
        dt,
        A,
        B,
        C,
        segments=past.segments,
        initial_state=state,
        want_final=state is not None,
        backend=backend,
    )


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    past: Past,
    state: Tensor | None,
    *,
    scale: float,
    backend: str,
) -> Result:
    """`kernels.delta` with L2-normalised q and k, [T, H, V] in q's type.

    q, k: [T, H or fewer, K]; v: [T, H, V]; beta: [T, H]; log_decay: None, [T, H] or [T, H, K]. state: [N, H, K, V].
    """
    if isinstance(past, Spanned):
        q, k = l2_normalize(q), l2_normalize(k)  # here, where the compiler still sees it
        return spanned.delta_rule(q, k, v, beta, log_decay, past, scale=scale, backend=backend), None
    return delta_kernel(
        q,
        k,
        v,
        beta,
        log_decay,
        segments=past.segments,
        scale=scale,
        l2_norm=True,
        initial_state=state,
        want_final=state is not None,
        backend=backend,
    )


def dplr_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    past: Past,
    state: Tensor | None,
    *,
    scale: float,
    lower_bound: float,
    backend: str,
) -> Result:
    """`kernels.dplr`, [T, H, V] in q's type; no log decay is below `lower_bound`.

    q, k, a, b, log_decay: [T, H, K]; v: [T, H, V]. state: [N, H, K, V].
    """
    if isinstance(past, Spanned):
        options = {"scale": scale, "lower_bound": lower_bound, "backend": backend}
        return spanned.dplr_rule(q, k, v, a, b, log_decay, past, **options), None
    return dplr_kernel(
        q,
        k,
        v,
        a,
        b,
        log_decay,
        segments=past.segments,
        scale=scale,
        lower_bound=lower_bound,
        initial_state=state,
        want_final=state is not None,
        backend=backend,
    )


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    log_decay: Tensor,
    past: Past,
    keys: Tensor | None,
    values: Tensor | None,
    *,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`kernels.slots`, [T, H, V] in q's type, and the slot keys and values that come out.

    q: [T, H, K]; k: [T, G, K]; v: [T, G, V]; s, log_decay: [T, G, S]. keys: [N, G, K, S]; values: [N, G, S, V].
    """
    if isinstance(past, Spanned):
        return spanned.slot_attention(q, k, v, s, log_decay, past, scale=scale, backend=backend), None, None
    q, k, v, s, log_decay = same_heads(q, k, v, s, log_decay)
    initial, times = None, 1
    if keys is not None and values is not None:
        times = q.shape[1] // keys.shape[1]
        initial = (repeat_heads(keys, times), repeat_heads(values, times))
    o, after = slot_kernel(
        q,
        k,
        v,
        s,
        log_decay,
        segments=past.segments,
        scale=scale,
        initial_state=initial,
        want_final=initial is not None,
        backend=backend,
    )
    return (o, None, None) if after is None else (o, after[0][:, ::times], after[1][:, ::times])


def quadratic_attention(
    q: Tensor, k: Tensor, v: Tensor, past: Past, state: Tensor | None, *, kind: str, eps: float, backend: str
) -> Result:
    """`kernels.quadratic`, normalised, [T, H, V] in q's type.

    q, k: [T, H, K]; v: [T, H, V]. state: [N, H, F, V + 1] for F second-order features.
    """
    if isinstance(past, Spanned):
        return spanned.quadratic_attention(q, k, v, past, kind=kind, eps=eps, backend=backend), None
    return quadratic_kernel(
        q,
        k,
        v,
        segments=past.segments,
        kind=kind,
        eps=eps,
        initial_state=state,
        want_final=state is not None,
        backend=backend,
    )
