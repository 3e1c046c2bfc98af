"""Expert capacity: which assignments an expert with room for a limited number of tokens keeps.

T tokens, k experts a token, E experts. An assignment is one of the T * k (token, expert) pairs.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

DROP_POLICIES = ("probability", "position")


def expert_capacity(tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """ceil(T * k / E * factor): assignments an expert keeps of so many tokens.

    Exact in the decimal that was written: 100 tokens at factor 1.1 make 110, not 111.
    """
    return math.ceil(Fraction(str(factor)) * tokens * top_k / num_experts)


def keep_within_capacity(
    topk_ids_Tk: Tensor,
    probs_TE: Tensor,
    capacity: int | Tensor,
    policy: str,
    *,
    counted_T: Tensor | None = None,
    sequence_T: Tensor | None = None,
) -> Tensor:
    """Mark the assignments that fit: bool [T, k].

    Each expert keeps its first `capacity` assignments, ordered by the router's probability (before any
    renormalisation) from high to low, ties by position, under policy "probability"; by token under "position", so
    later tokens are dropped first. The weights of a token's surviving experts are not changed.

    counted_T: bool [T], False for padding, which keeps nothing and takes no one's place. sequence_T: int64 [T], the
    sequence of each token; an expert then keeps as many of every sequence by itself as `capacity`, int64 [S], says.
    """
    (T, k), E = topk_ids_Tk.shape, probs_TE.shape[1]
    places_Tk, limits_T1 = topk_ids_Tk, capacity
    if sequence_T is not None:
        assert isinstance(capacity, Tensor)
        places_Tk, limits_T1 = sequence_T.unsqueeze(1) * E + topk_ids_Tk, capacity[sequence_T].unsqueeze(1)
    if counted_T is not None:  # behind all places
        places_Tk = places_Tk.masked_fill(~counted_T.unsqueeze(1), torch.iinfo(torch.int64).max)
    ids_A = places_Tk.flatten()
    if policy == "probability":
        by_probability_A = probs_TE.detach().gather(-1, topk_ids_Tk).flatten().argsort(descending=True, stable=True)
        order_A = by_probability_A[ids_A[by_probability_A].argsort(stable=True)]
    else:
        assert policy == "position", policy
        order_A = ids_A.argsort(stable=True)
    # ids in order: [0 0 0 1 1 3]; each group's first index: [0 0 0 3 3 5]; rank within its expert: [0 1 2 0 1 0]
    sorted_A = ids_A[order_A]
    rank_A = torch.arange(T * k, device=ids_A.device) - torch.searchsorted(sorted_A, sorted_A)
    keep_Tk = torch.empty_like(ids_A).scatter_(0, order_A, rank_A).view(T, k) < limits_T1
    return keep_Tk if counted_T is None else keep_Tk & counted_T.unsqueeze(1)
