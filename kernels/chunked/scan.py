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


def scan_decay(
    log_a: Tensor, b: Tensor, s0: Tensor | None, want_final: bool, radix: int = 32
) -> tuple[Tensor, Tensor | None]:
    """The scan for scalar and diagonal A = e^{log_a}.

    Groups of `radix` chunks are folded by one matmul with their decay matrix, the groups' own summaries by the same
    function again, so the work is linear in M and the depth is log_radix(M).

    log_a: [B, H or 1, P, M]; b: [B, H, P, M, Y]; s0: the state before the first chunk, [B, H, P, Y].
    Returns the states [B, H, P, M, Y] before every chunk and the state [B, H, P, Y] after the last one.
    """
    M = b.shape[-2]
    if radix >= M:
        return _scan_group(log_a, b, s0, want_final)
    groups = -(-M // radix)
    padding = groups * radix - M
    if padding:
        log_a = torch.nn.functional.pad(log_a, (0, padding))
        b = torch.nn.functional.pad(b, (0, 0, 0, padding))
    log_a, b = log_a.unflatten(-1, (groups, radix)), b.unflatten(-2, (groups, radix))
    local, total = _scan_group(log_a, b, None, True)
    assert total is not None
    since = running_sum(log_a, -1)
    entering, final = scan_decay(since[..., -1], total, s0, want_final, radix)
    decay = decay_factor(_exclusive(since), b.dtype)
    states = torch.addcmul(local, decay.unsqueeze(-1), entering.unsqueeze(-2))
    return states.flatten(-3, -2)[..., :M, :], final


def _scan_group(log_a: Tensor, b: Tensor, s0: Tensor | None, want_final: bool) -> tuple[Tensor, Tensor | None]:
    since = running_sum(log_a, -1)
    to = _exclusive(since)
    mask = causal_mask(log_a.shape[-1], log_a.device, -1)
    matrix = drop_negligible(decay_matrix(to, since, mask, b.dtype))  # exactly 0 across documents
    states = torch.matmul(decayed(torch.ones_like(matrix), matrix, to, since), b)
    if s0 is not None:
        states = states + decay_factor(to, b.dtype).unsqueeze(-1) * s0.unsqueeze(-2)
    if not want_final:
        return states, None
    total = since[..., -1:]
    final = torch.matmul(decay_factor(total - since, b.dtype).unsqueeze(-2), b).squeeze(-2)
    if s0 is not None:
        final = final + decay_factor(total, b.dtype) * s0
    return states, final


def _exclusive(since: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(since[..., :1]), since[..., :-1]], -1)


def scan_dense(
    a: Tensor, b: Tensor, s0: Tensor | None, want_final: bool, loop_below: int = 16
) -> tuple[Tensor, Tensor | None]:
    """The scan for dense A: neighbours are folded in pairs, the half as many pairs by the same function again.

    a: [B, H, M, K, K]; b: [B, H, M, K, V]; s0: [B, H, K, V]. Returns the states [B, H, M, K, V] before every chunk and
    the state [B, H, K, V] after the last one.
    """
    M = b.shape[2]
    if loop_below >= M:
        return _scan_loop(a, b, s0, want_final)
    K, pairs = a.shape[-1], M // 2
    odd_chunk_left = M % 2 == 1
    a_pairs, b_pairs = (x[:, :, : 2 * pairs].unflatten(2, (pairs, 2)) for x in (a, b))
    a_first, a_second = a_pairs.unbind(3)
    b_first, b_second = b_pairs.unbind(3)
    # (A2, B2) after (A1, B1) is (A2 A1, A2 B1 + B2)
    folded = torch.matmul(a_second, torch.cat([a_first, b_first], -1))
    a_folded, b_folded = shrink_negligible(folded[..., :K]), folded[..., K:] + b_second
    entering, final = scan_dense(a_folded, b_folded, s0, want_final or odd_chunk_left, loop_below)
    between = torch.matmul(a_first, entering) + b_first
    states = torch.stack([entering, between], 3).flatten(2, 3)
    if odd_chunk_left:
        assert final is not None
        states = torch.cat([states, final.unsqueeze(2)], 2)
        final = torch.matmul(a[:, :, -1], final) + b[:, :, -1] if want_final else None
    return states, final


def _scan_loop(a: Tensor, b: Tensor, s0: Tensor | None, want_final: bool) -> tuple[Tensor, Tensor | None]:
    state = torch.zeros_like(b[:, :, 0]) if s0 is None else s0
    states = []
    a_list, b_list = a.unbind(2), b.unbind(2)
    for m in range(len(a_list)):
        states.append(state)
        if m + 1 < len(a_list) or want_final:
            state = torch.matmul(a_list[m], state) + b_list[m]
    return torch.stack(states, 2), state if want_final else None
