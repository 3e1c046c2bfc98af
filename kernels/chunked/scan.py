"""The states that enter the chunks: S_{m+1} = A_m S_m + B_m for all chunks at once.

Legend: B rows, H heads, M chunks, R radix, K key head dim, P decays per head (1 or K), Y entries per decay.
"""

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunked.decay import (
    causal_mask,
    decay_factor,
    decay_matrix,
    decayed,
    drop_negligible,
    running_sum,
    shrink_negligible,
)


def scan_decay(log_a: Tensor, b: Tensor, radix: int = 32) -> Tensor:
    """The states [B, H, P, M, Y] before every chunk, for scalar and diagonal A = e^{log_a}, from zero.

    Groups of `radix` chunks are folded by one matmul with their decay matrix, the groups' own summaries by the same
    function again, so the work is linear in M and the depth is log_radix(M).

    log_a: [B, H or 1, P, M]; b: [B, H, P, M, Y].
    """
    M = b.shape[-2]
    if radix >= M:
        return _scan_group(log_a, b)
    groups = -(-M // radix)
    padding = groups * radix - M
    if padding:
        log_a = torch.nn.functional.pad(log_a, (0, padding))
        b = torch.nn.functional.pad(b, (0, 0, 0, padding))
    log_a, b = log_a.unflatten(-1, (groups, radix)), b.unflatten(-2, (groups, radix))
    local, since = _scan_group(log_a, b), running_sum(log_a, -1)
    total = torch.matmul(decay_factor(since[..., -1:] - since, b.dtype).unsqueeze(-2), b).squeeze(-2)
    entering = scan_decay(since[..., -1], total, radix)
    decay = decay_factor(_exclusive(since), b.dtype)
    states = torch.addcmul(local, decay.unsqueeze(-1), entering.unsqueeze(-2))
    return states.flatten(-3, -2)[..., :M, :]


def _scan_group(log_a: Tensor, b: Tensor) -> Tensor:
    since = running_sum(log_a, -1)
    to = _exclusive(since)
    mask = causal_mask(log_a.shape[-1], log_a.device, -1)
    matrix = drop_negligible(decay_matrix(to, since, mask, b.dtype))  # exactly 0 across documents
    return torch.matmul(decayed(torch.ones_like(matrix), matrix, to, since), b)


def _exclusive(since: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(since[..., :1]), since[..., :-1]], -1)


def scan_dense(a: Tensor, b: Tensor, loop_below: int = 16) -> Tensor:
    """The states [B, H, M, K, V] before every chunk, for dense A, from zero.

    Neighbours are folded in pairs, the half as many pairs by the same function again. a: [B, H, M, K, K];
    b: [B, H, M, K, V].
    """
    M = b.shape[2]
    if loop_below >= M:
        return _scan_loop(a, b)
    K, pairs = a.shape[-1], -(-M // 2)
    if M % 2:
        a, b = (torch.cat([x, torch.zeros_like(x[:, :, :1])], 2) for x in (a, b))
    a_first, a_second = a.unflatten(2, (pairs, 2)).unbind(3)
    b_first, b_second = b.unflatten(2, (pairs, 2)).unbind(3)
    # (A2, B2) after (A1, B1) is (A2 A1, A2 B1 + B2)
    folded = torch.matmul(a_second, torch.cat([a_first, b_first], -1))
    entering = scan_dense(shrink_negligible(folded[..., :K]), folded[..., K:] + b_second, loop_below)
    between = torch.matmul(a_first, entering) + b_first
    return torch.stack([entering, between], 3).flatten(2, 3)[:, :, :M]


def _scan_loop(a: Tensor, b: Tensor) -> Tensor:
    states = [torch.zeros_like(b[:, :, 0])]
    for a_m, b_m in list(zip(a.unbind(2), b.unbind(2), strict=True))[:-1]:
        states.append(torch.matmul(a_m, states[-1]) + b_m)
    return torch.stack(states, 2)
