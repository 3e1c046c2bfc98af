"""flash-linear-attention's chunk kernels behind our operators (package fla-core, written against 0.6.0).

    identity        chunk_simple_gla
    constant        chunk_simple_gla(g_gamma): no gradient of the decay, no final state, see `linear_kind`
    scalar          chunk_simple_gla(g): a constant decay is spread over the tokens
    diagonal        chunk_gla
    bonus           chunk_rwkv6
    delta           chunk_delta_rule: heads repeated; in float32, which it refuses, chunk_gated_delta_rule
    gated_delta     chunk_gated_delta_rule: value heads may outnumber key heads
    kda             chunk_kda: the same
    dplr_rule       chunk_rwkv7: larger chunks where the caller bounds the decays from below
    slot_attention  chunk_gsa

chunk_simple_gla(g_gamma) gives NaN final states where a row or document ends with a short chunk, and ignores the
gradient of g_gamma; that is why such calls go by g. Gates and states are float32. Odd head dims are padded, because the
backward of 16-bit values refuses them. Gates must be finite.

Legend: B rows, T tokens, H heads, K/V key/value head dim, N documents.
"""

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlinearmoe.kernels.backends.borders import find_borders
from torchlinearmoe.kernels.backends.call import States, delta_kind, linear_kind, outside_graphs


@outside_graphs
def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    states: States,
) -> tuple[Tensor, Tensor | None]:
    """`reference.linear.linear_recurrence`; the arguments as there, `states` fp32."""
    K, V = q.shape[-1], v.shape[-1]
    q, k, v = _even(q), _even(k.to(q.dtype)), _even(v.to(q.dtype))
    kind = linear_kind(log_decay, bonus, states.want_final)
    tokens = {"q": q, "k": k, "v": v}
    fixed: dict[str, Tensor] = {}
    if kind == "identity":
        function = "chunk_simple_gla"
    elif kind == "constant":
        function, fixed["g_gamma"] = "chunk_simple_gla", _gate(log_decay)
    elif kind == "scalar":
        gate = _gate(log_decay)
        function, tokens["g"] = "chunk_simple_gla", gate if gate.dim() == 3 else gate.expand(q.shape[:3])
    elif kind == "diagonal":
        function, tokens["g"] = "chunk_gla", _even(_gate(log_decay))
    else:
        assert bonus is not None
        function = "chunk_rwkv6"
        tokens = {"r": q, "k": k, "v": v, "w": _even(_gate(log_decay))}
        fixed["u"] = _even(bonus.float())
    o, final = _run(function, tokens, fixed, scale, states, _state(states))
    return o[..., :V], None if final is None else final[0][..., :K, :V]


@outside_graphs
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    states: States,
) -> tuple[Tensor, Tensor | None]:
    """`reference.delta.delta_rule`; the arguments as there, `states` fp32."""
    K, V = q.shape[-1], v.shape[-1]
    q, k, v = _even(q), _even(k.to(q.dtype)), _even(v.to(q.dtype))
    tokens = {"q": q, "k": k, "v": v, "beta": beta.float()}
    kind = delta_kind(log_decay)
    if kind == "kda":
        function, tokens["g"] = "chunk_kda", _even(_gate(log_decay))
    elif kind == "delta" and q.dtype != torch.float32:
        function, groups = "chunk_delta_rule", v.shape[2] // q.shape[2]
        if groups > 1:
            tokens["q"], tokens["k"] = q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2)
    else:
        function = "chunk_gated_delta_rule"
        tokens["g"] = torch.zeros_like(tokens["beta"]) if log_decay is None else _gate(log_decay)
    o, final = _run(function, tokens, {}, scale, states, _state(states))
    return o[..., :V], None if final is None else final[0][..., :K, :V]


@outside_graphs
def dplr_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    lower_bound: float | None,
    scale: float,
    states: States,
) -> tuple[Tensor, Tensor | None]:
    """`reference.dplr.dplr_rule`; no log decay is below `lower_bound`; the arguments as there, `states` fp32."""
    K, V = q.shape[-1], v.shape[-1]
    tokens = {"r": _even(q), "w": _even(_gate(log_decay))}
    tokens |= {name: _even(x.to(q.dtype)) for name, x in (("k", k), ("v", v), ("a", a), ("b", b))}
    fixed = {"lower_bound": lower_bound}
    o, final = _run("chunk_rwkv7", tokens, fixed, scale, states, _state(states))
    return o[..., :V], None if final is None else final[0][..., :K, :V]


@outside_graphs
def slot_attention(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, log_decay: Tensor, scale: float, keys: States, values: States
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """`reference.gsa.slot_attention`; the arguments as there, the states of slot keys and slot values fp32."""
    K, V = q.shape[-1], v.shape[-1]
    q, k, v = _even(q), _even(k.to(q.dtype)), _even(v.to(q.dtype))
    tokens = {"q": q, "k": k, "v": v, "s": s.to(q.dtype), "g": _gate(log_decay)}
    initial = None
    if keys.initial is not None and values.initial is not None:
        initial = (_even(keys.initial.mT).mT, _even(values.initial))
    o, final = _run("chunk_gsa", tokens, {}, scale, keys, initial)
    return o[..., :V], None if final is None else (final[0][..., :K, :], final[1][..., :V])


def _run(
    function: str,
    tokens: dict[str, Tensor],
    fixed: dict[str, Any],
    scale: float,
    states: States,
    initial: tuple[Tensor, ...] | None,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Call `fla.ops.<function>` with `tokens` [B, T, ...], `fixed`, which has no tokens, and one state or several."""
    borders = find_borders(states)
    # Plain rows spare their kernels the borders, and us their waits for the device.
    rows = borders if borders is not None and borders.even else None
    arguments: dict[str, Any] = {"scale": scale, "output_final_state": states.want_final, **fixed}
    for name, x in tokens.items():
        arguments[name] = (x if rows is None else rows.rows(x)).contiguous()
    if borders is not None and rows is None:
        arguments |= {"cu_seqlens": borders.cu_seqlens, "cu_seqlens_cpu": borders.cu_seqlens_host}
    if initial is not None:
        entering = [(x if borders is None else borders.select(x)).contiguous() for x in initial]
        arguments["initial_state"] = tuple(entering) if len(entering) > 1 else entering[0]
    o, final = getattr(importlib.import_module("fla.ops"), function)(**arguments)
    o = o if rows is None else rows.flat(o)
    if not states.want_final:
        return o, None
    finals = tuple(final) if isinstance(final, (list, tuple)) else (final,)
    if borders is not None:
        finals = tuple(borders.restore(x, None if initial is None else initial[i]) for i, x in enumerate(finals))
    return o, finals


def _state(states: States) -> tuple[Tensor] | None:
    """The initial state with even dims."""
    return None if states.initial is None else (_even(_even(states.initial).mT).mT,)


def _gate(log_decay: Tensor | None) -> Tensor:
    assert log_decay is not None
    return log_decay.float()


def _even(x: Tensor) -> Tensor:
    """x with a column of zeros after an odd last dim."""
    return F.pad(x, (0, 1)) if x.shape[-1] % 2 else x
