"""One token at a time: the forms that decoding uses, with a state of constant size.

Legend: B sequences, H heads, K/V key/value head dim, D channels, W kernel width. States are fp32 (fp64 for fp64
inputs); a step returns a new state and leaves the old one alone.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlinearmoe.kernels.normalize import l2_normalize
from torchlinearmoe.kernels.quadratic_features import QuadraticFeatures


def linear_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    scale: float | None = None,
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `reference.linear.linear_recurrence`.

    q, k: [B, H, K]; v: [B, H, V]; log_decay: None, [H], [B, H] or [B, H, K]; bonus: [H, K]; state: [B, H, K, V].
    Returns o [B, H, V] in q's dtype and the new state.
    """
    write = k.to(state.dtype).unsqueeze(-1) * v.to(state.dtype).unsqueeze(-2)
    new_state = write + _decayed(state, log_decay)
    read = new_state if bonus is None else state + bonus.to(state.dtype).unsqueeze(-1) * write
    return _read(q, read, scale), new_state


def delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    scale: float | None = None,
    l2_norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token of `reference.delta.delta_rule`.

    q, k: [B, H, K]; v: [B, HV, V]; beta: [B, HV]; log_decay: None, [B, HV] or [B, HV, K]; state: [B, HV, K, V];
    l2_norm divides q and k by their length first. Returns o [B, HV, V] in q's dtype and the new state.
    """
    if l2_norm:
        q, k = l2_normalize(q), l2_normalize(k)
    groups = v.shape[1] // q.shape[1]
    if groups > 1:
        q, k = q.repeat_interleave(groups, 1), k.repeat_interleave(groups, 1)
    k_BHK = k.to(state.dtype)
    state = _decayed(state, log_decay)
    error = v.to(state.dtype) - torch.matmul(k_BHK.unsqueeze(-2), state).squeeze(-2)
    new_state = state + k_BHK.unsqueeze(-1) * (beta.to(state.dtype).unsqueeze(-1) * error).unsqueeze(-2)
    return _read(q, new_state, scale), new_state


def dplr_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `reference.dplr.dplr_rule`.

    q, k, a, b, log_decay: [B, H, K]; v: [B, H, V]; state: [B, H, K, V]. Returns o [B, H, V] in q's dtype and the new
    state.
    """
    x = torch.matmul(a.to(state.dtype).unsqueeze(-2), state)
    write = k.to(state.dtype).unsqueeze(-1) * v.to(state.dtype).unsqueeze(-2)
    new_state = _decayed(state, log_decay) + b.to(state.dtype).unsqueeze(-1) * x + write
    return _read(q, new_state, scale), new_state


def slot_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    log_decay: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One token of `reference.gsa.slot_attention`.

    q, k: [B, H, K]; v: [B, H, V]; s, log_decay: [B, H, S]; keys: [B, H, K, S]; values: [B, H, S, V].
    Returns o [B, H, V] in q's dtype and the new slot keys and values.
    """
    s_BHS = s.to(keys.dtype)
    decay = log_decay.to(keys.dtype).exp()
    keys = keys * decay.unsqueeze(-2) + k.to(keys.dtype).unsqueeze(-1) * s_BHS.unsqueeze(-2)
    values = values * decay.unsqueeze(-1) + s_BHS.unsqueeze(-1) * v.to(values.dtype).unsqueeze(-2)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    weights = (factor * torch.matmul(q.to(keys.dtype).unsqueeze(-2), keys)).softmax(-1)
    return torch.matmul(weights, values).squeeze(-2).to(q.dtype), (keys, values)


def convolution_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, *, activation: str | None = None
) -> tuple[Tensor, Tensor]:
    """One token of `reference.convolution.short_convolution`.

    x: [B, D]; weight: [D, W]; bias: [D]; state: the last W - 1 inputs, oldest first, [B, W - 1, D].
    Returns y [B, D] and the new state, both in x's dtype.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    window = torch.cat([state.to(x.dtype), x.unsqueeze(1)], 1)
    y = (window.to(dtype) * weight.t().to(dtype)).sum(1)
    y = y if bias is None else y + bias.to(dtype)
    y = F.silu(y) if activation == "silu" else y
    return y.to(x.dtype), window[:, 1:]


def quadratic_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    kind: str,
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """One token of `reference.quadratic.quadratic_attention`.

    q, k: [B, H, K]; v: [B, H, V]; state: [B, H, F, V + 1], or [B, H, F, V] without `normalize`. Returns o [B, H, V] in
    q's dtype and the new state.
    """
    phi = QuadraticFeatures(kind, q.shape[-1], q.shape[-1] ** -0.5 if scale is None else scale, q.device)
    write = v.to(state.dtype)
    if normalize:
        write = torch.cat([write, torch.ones_like(write[..., :1])], -1)
    new_state = state + phi.features(k.to(state.dtype)).unsqueeze(-1) * write.unsqueeze(-2)
    read = torch.matmul(phi.features(q.to(state.dtype)).unsqueeze(-2), new_state).squeeze(-2)
    if normalize:
        read = read[..., :-1] / (read[..., -1:] + eps)
    return read.to(q.dtype), new_state


def token_shift_step(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of `reference.token_shift.token_shift`.

    x: [B, D]; state: [B, 1, D]. Returns the token before, in x's dtype, and the new state.
    """
    return state[:, 0].to(x.dtype), x.unsqueeze(1)


def _decayed(state: Tensor, log_decay: Tensor | None) -> Tensor:
    if log_decay is None:
        return state
    decay = log_decay.to(state.dtype).exp()
    if log_decay.dim() < 3:
        return decay[..., None, None] * state
    return decay.unsqueeze(-1) * state


def _read(q: Tensor, state: Tensor, scale: float | None) -> Tensor:
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return (factor * torch.matmul(q.to(state.dtype).unsqueeze(-2), state).squeeze(-2)).to(q.dtype)
