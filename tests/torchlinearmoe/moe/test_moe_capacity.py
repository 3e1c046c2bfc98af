"""Capacity: which assignments stay, against a brute-force reading of the rule."""

import pytest
import torch

from torchlinearmoe.moe.capacity import expert_capacity, keep_within_capacity


def brute_force(ids: torch.Tensor, probs: torch.Tensor, capacity: int, policy: str) -> torch.Tensor:
    keep = torch.zeros_like(ids, dtype=torch.bool)
    for e in range(probs.shape[1]):
        places = [(t, j) for t in range(ids.shape[0]) for j in range(ids.shape[1]) if ids[t, j] == e]
        if policy == "probability":
            places.sort(key=lambda place: (-probs[place[0], e].item(), place[0]))
        for t, j in places[:capacity]:
            keep[t, j] = True
    return keep


@pytest.mark.parametrize("policy", ["probability", "position"])
@pytest.mark.parametrize("capacity", [0, 1, 3, 1000])
@pytest.mark.parametrize("T, E, k, levels", [(1, 3, 2, 1000), (30, 5, 2, 1000), (40, 4, 4, 3)])
def test_keeps_what_the_rule_says(T: int, E: int, k: int, levels: int, capacity: int, policy: str) -> None:
    """Few `levels` of probability make ties, which go to the earlier token."""
    torch.manual_seed(T + capacity)
    probs = torch.randint(levels, (T, E)) / levels
    ids = torch.rand(T, E).topk(k).indices
    assert torch.equal(keep_within_capacity(ids, probs, capacity, policy), brute_force(ids, probs, capacity, policy))


def test_capacity_rounds_up_and_is_exact_in_decimals() -> None:
    assert expert_capacity(100, 1, 1, 1.1) == 110
    assert expert_capacity(10, 2, 8, 1.0) == 3
    assert expert_capacity(1, 1, 64, 0.5) == 1
    assert expert_capacity(2048, 8, 64, 1.25) == 320
