"""The one entry of every recurrence: what is before the tokens (`past`) decides how it is computed.

Documents that start empty, documents that go on from a state or from other ranks, and single tokens give the same
numbers. States are read from `past.state` and left in `past.after` under the name of the part.

Shapes: T tokens, N documents, H heads, G heads of the state (each read by H / G neighbouring query heads), K and V key
and value width of a head, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from torchlinearmoe.kernels import ops, step
from torchlinearmoe.mixers import spanned
from torchlinearmoe.mixers.past import Empty, Past, Resumed, Spanned
from torchlinearmoe.mixers.tail import repeat_heads, same_heads


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    past: Past,
    *,
    scale: float,
    bonus: Tensor | None = None,
    backend: str,
    name: str = "recurrent",
) -> Tensor:
    """`ops.linear_recurrence` of packed documents, [T, H, V] in q's type.

    q: [T, H, K]; k: [T, G, K]; v: [T, G, V]; log_decay: None, [H], [T, G] or [T, G, K]; any of them may have fewer
    heads, each then stands for neighbouring ones. State `name`: [N, G, K, V].
    """
    if isinstance(past, Spanned):
        return spanned.linear_recurrence(q, k, v, log_decay, past, scale=scale, bonus=bonus, backend=backend)
    q, k, v, log_decay = same_heads(q, k, v, log_decay)
    options = {"scale": scale, "bonus": bonus}
    return _run(ops.linear_recurrence, step.linear_step, (q, k, v, log_decay), past, (name,), backend, options)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    past: Past,
    *,
    scale: float,
    backend: str,
    name: str = "recurrent",
) -> Tensor:
    """`ops.delta_rule` with L2-normalised q and k of packed documents, [T, H, V] in q's type.

    q, k: [T, H or fewer, K]; v: [T, H, V]; beta: [T, H]; log_decay: None, [T, H] or [T, H, K]. State `name`:
    [N, H, K, V].
    """
    options = {"scale": scale, "l2_norm": True}
    inputs = (q, k, v, beta, log_decay)
    if isinstance(past, Spanned):
        return spanned.dense_recurrence(ops.delta_rule, inputs, 2, past, backend=backend, **options)
    return _run(ops.delta_rule, step.delta_step, inputs, past, (name,), backend, options)


def dplr_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    past: Past,
    *,
    scale: float,
    lower_bound: float,
    backend: str,
    name: str = "recurrent",
) -> Tensor:
    """`ops.dplr_rule` of packed documents, [T, H, V] in q's type; no log decay is below `lower_bound`.

    q, k, a, b, log_decay: [T, H, K]; v: [T, H, V]. State `name`: [N, H, K, V].
    """
    op, inputs = partial(ops.dplr_rule, lower_bound=lower_bound), (q, k, v, a, b, log_decay)
    if isinstance(past, Spanned):
        return spanned.dense_recurrence(op, inputs, 2, past, backend=backend, scale=scale)
    return _run(op, step.dplr_step, inputs, past, (name,), backend, {"scale": scale})


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    log_decay: Tensor,
    past: Past,
    *,
    scale: float,
    backend: str,
    names: tuple[str, str] = ("slot_keys", "slot_values"),
) -> Tensor:
    """`ops.slot_attention` of packed documents, [T, H, V] in q's type.

    q: [T, H, K]; k: [T, G, K]; v: [T, G, V]; s, log_decay: [T, G, S]. States `names`: [N, G, K, S] and [N, G, S, V].
    """
    if isinstance(past, Spanned):
        return spanned.slot_attention(q, k, v, s, log_decay, past, scale=scale, backend=backend)
    inputs = same_heads(q, k, v, s, log_decay)
    return _run(ops.slot_attention, step.slot_step, inputs, past, names, backend, {"scale": scale})


def quadratic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Past,
    *,
    kind: str,
    eps: float,
    backend: str,
    name: str = "recurrent",
) -> Tensor:
    """`ops.quadratic_attention` of packed documents, normalised, [T, H, V] in q's type.

    q, k: [T, H, K]; v: [T, H, V]. State `name`: [N, H, F, V + 1] for F second-order features.
    """
    if isinstance(past, Spanned):
        return spanned.quadratic_attention(q, k, v, past, kind=kind, eps=eps, backend=backend)
    options = {"kind": kind, "eps": eps}
    return _run(ops.quadratic_attention, step.quadratic_step, (q, k, v), past, (name,), backend, options)


def _run(
    op: Callable[..., Any],
    one_step: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    past: Empty | Resumed,
    names: tuple[str, ...],
    backend: str,
    options: dict[str, Any],
) -> Tensor:
    """`op` over `inputs` [T, ...] as one packed row, or `one_step`; `names` are its states."""
    row = [x if x is None or x.dim() == 1 else x[None] for x in inputs]
    if isinstance(past, Empty):
        return op(*row, document_ids=past.ids, backend=backend, **options)[0][0]
    heads = max(x.shape[1] for x in inputs if x is not None and x.dim() > 1)
    times = heads // past.state[names[0]].shape[1]
    states = tuple(repeat_heads(past.state[name], times) for name in names)
    if past.stepping:
        o, after = one_step(*inputs, *states, **options)
    else:
        o, after = op(
            *row,
            initial_state=states if len(names) > 1 else states[0],
            output_final_state=True,
            cu_seqlens=past.cu_seqlens,
            document_ids=past.ids,
            backend=backend,
            **options,
        )
        o = o[0]
    for name, part in zip(names, after if len(names) > 1 else (after,), strict=True):
        past.after[name] = part[:, ::times]
    return o
