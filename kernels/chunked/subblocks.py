"""Scores under a decay per channel by sub-blocks: the form for torch.compile.

Same result as `halving.halved_scores`, written without writes into slices, so that a compiler can fuse it. A chunk is
cut into sub-blocks of 16 tokens. Between sub-blocks the decay is split at the border of the query's own: queries
carry theirs since it, keys theirs until it, and a matmul makes the scores. Inside a sub-block every pair has its own
exponential, which a compiler sums over channels without ever storing it. All exponents are differences of sums over
at most a sub-block, plus whole sub-blocks, and never positive beyond rounding.

Legend: C tokens of a chunk, S sub-blocks of c = 16 tokens, K channels.
"""

import torch
from torch import Tensor

SIZE = 16
FLOOR = -50.0
"""Log decays are clamped here; e^-50 is negligible, and sums over a sub-block keep their digits."""


def subblock_scores(
    q: Tensor, k: Tensor, log_decay: Tensor, own: Tensor | None, matmul_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of every query against every key of its chunk up to its own token.

    q, k, log_decay: [..., C, K], C a multiple of 16, fp32 or fp64. own: [..., C], the score against the own token's key
    of queries that read the state before their token (their own decay left out); None for queries that read it after.
    Returns the scores [..., C, C] (lower triangular, in `matmul_dtype`), the queries decayed since the chunk's start
    and the keys decayed until its end, both [..., C, K].
    """
    q, k, g = (x.unflatten(-2, (-1, SIZE)) for x in (q, k, log_decay))  # [..., S, c, K]
    g = g.clamp(min=FLOOR)
    until = g.cumsum(-2)  # of a token within its sub-block, its own decay included
    since = until if own is None else until - g
    total = until[..., -1:, :]  # [..., S, 1, K]
    q_border = q * since.exp()
    k_border = k * (total - until).exp()
    rows = []
    S = q.shape[-3]
    inside = _inside(q, k, since, until, own).to(matmul_dtype)
    for i in range(S):
        parts = []
        if i:
            # What lies between key sub-block j and query sub-block i: the totals of j + 1 .. i - 1.
            between = torch.cat([total[..., j + 1 : i, :, :].sum(-3, keepdim=True) for j in range(i)], -3)
            keys = (k_border[..., :i, :, :] * between.exp()).flatten(-3, -2)
            queries = q_border[..., i, :, :].to(matmul_dtype)
            parts.append(torch.matmul(queries, keys.to(matmul_dtype).transpose(-1, -2)))
        parts.append(inside[..., i, :, :])
        if i < S - 1:
            parts.append(inside.new_zeros(*inside.shape[:-3], SIZE, (S - 1 - i) * SIZE))
        rows.append(torch.cat(parts, -1))
    total = total.squeeze(-2)
    before = total.cumsum(-2) - total
    after = total.sum(-2, keepdim=True) - total.cumsum(-2)
    q_in = q_border * before.exp().unsqueeze(-2)
    k_out = k_border * after.exp().unsqueeze(-2)
    return torch.cat(rows, -2), q_in.flatten(-3, -2), k_out.flatten(-3, -2)


def _inside(q: Tensor, k: Tensor, since: Tensor, until: Tensor, own: Tensor | None) -> Tensor:
    """Scores [..., S, c, c] inside every sub-block."""
    earlier = torch.ones(SIZE, SIZE, dtype=torch.bool, device=q.device).tril(0 if own is None else -1)
    exponents = torch.where(earlier.unsqueeze(-1), since.unsqueeze(-2) - until.unsqueeze(-3), 0.0)
    scores = (q.unsqueeze(-2) * k.unsqueeze(-3) * exponents.exp()).sum(-1)
    scores = torch.where(earlier, scores, 0.0)
    return scores if own is None else scores + torch.diag_embed(own.unflatten(-1, (-1, SIZE)))
