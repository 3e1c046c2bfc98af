"""One way for every linear mixer to run its recurrence: packed, going on from a state, or one token at a time.

Shapes: T tokens, N documents, H heads, K and V key and value width of a head, S slots.
"""

from __future__ import annotations

from torch import Tensor

from torchlinearmoe.kernels import ops, step
from torchlinearmoe.mixers.base import Context
from torchlinearmoe.mixers.tail import repeat_heads


def resume_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    context: Context,
    state: Tensor,
    *,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Linear recurrence of documents that go on from `state` [N, H, K, V]; q, k: [T, H, K], v: [T, H, V].

    log_decay: None, [H], [T, H] or [T, H, K]. Returns (o [T, H, V], new state). A state of fewer heads, [N, G, K, V],
    stands for groups of H / G heads that write the same; it comes back as small.
    """
    times = q.shape[1] // state.shape[1]
    state = repeat_heads(state, times)
    if context.stepping:
        o, after = step.linear_step(q, k, v, log_decay, state, scale=scale)
        return o, after[:, ::times]
    o, after = ops.linear_recurrence(
        q[None],
        k[None],
        v[None],
        log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[None],
        scale=scale,
        initial_state=state,
        output_final_state=True,
        cu_seqlens=context.documents.cu_seqlens,
        document_ids=context.documents.ids,
        backend=backend,
    )
    assert after is not None
    return o[0], after[:, ::times]


def resume_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    log_decay: Tensor,
    context: Context,
    state: tuple[Tensor, Tensor],
    *,
    scale: float,
    backend: str,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Slot attention going on from `state`, slot keys [N, H, K, S] and values [N, H, S, V]; s, log_decay: [T, H, S].

    Returns (o [T, H, V], new state); a state of fewer heads is shared by groups of heads, as in `resume_linear`.
    """
    times = q.shape[1] // state[0].shape[1]
    keys, values = (repeat_heads(part, times) for part in state)
    if context.stepping:
        o, after = step.slot_step(q, k, v, s, log_decay, keys, values, scale=scale)
        return o, (after[0][:, ::times], after[1][:, ::times])
    o, after = ops.slot_attention(
        q[None],
        k[None],
        v[None],
        s[None],
        log_decay[None],
        scale=scale,
        initial_state=(keys, values),
        output_final_state=True,
        cu_seqlens=context.documents.cu_seqlens,
        document_ids=context.documents.ids,
        backend=backend,
    )
    assert after is not None
    return o[0], (after[0][:, ::times], after[1][:, ::times])


def resume_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    context: Context,
    state: Tensor,
    *,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(Gated) delta rule with L2-normalised q and k going on from `state` [N, HV, K, V]; beta: [T, HV]."""
    if context.stepping:
        return step.delta_step(q, k, v, beta, log_decay, state, scale=scale, l2_norm=True)
    o, after = ops.delta_rule(
        q[None],
        k[None],
        v[None],
        beta[None],
        None if log_decay is None else log_decay[None],
        scale=scale,
        l2_norm=True,
        initial_state=state,
        output_final_state=True,
        cu_seqlens=context.documents.cu_seqlens,
        document_ids=context.documents.ids,
        backend=backend,
    )
    assert after is not None
    return o[0], after
