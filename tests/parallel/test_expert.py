"""Rows that arrive rank after rank are sorted by expert, whatever the counts; degrees that cannot be are refused."""

from typing import Any

import pytest
import torch

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.parallel.expert import by_expert
from torchlinearmoe.parallel.mesh import resolve_degrees
from torchlinearmoe.recipe import ParallelRecipe, resolve


@pytest.mark.parametrize("ranks, experts", [(1, 1), (2, 3), (4, 1), (3, 5)])
@pytest.mark.parametrize("highest", [1, 2, 6])
def test_received_rows_come_by_expert_then_rank(ranks: int, experts: int, highest: int) -> None:
    counts_PE = torch.randint(highest, (ranks, experts))
    labels = [(e, p, i) for p in range(ranks) for e in range(experts) for i in range(int(counts_PE[p, e]))]
    order_N, inverse_N = by_expert(counts_PE, len(labels))
    assert [labels[i] for i in order_N.tolist()] == sorted(labels)
    assert torch.equal(order_N[inverse_N], torch.arange(len(labels)))


@pytest.mark.parametrize(
    "tables, told",
    [
        ({"expert": 3}, r"parallel.expert = 3: must divide moe.num_experts = 4; legal: 1, 2, 4$"),
        ({"expert": 0}, r"parallel.expert = 0: must be at least 1"),
    ],
)
def test_a_share_of_the_experts_is_whole(tables: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        resolve({"parallel": tables, "training": {"steps": 1}})


def test_a_model_without_experts_has_none_to_spread() -> None:
    with pytest.raises(RecipeError, match=r"parallel.expert = 2: there are no experts .*; legal: 1$"):
        resolve({"moe": {"num_experts": 0, "top_k": 0}, "parallel": {"expert": 2}, "training": {"steps": 1}})


def test_experts_borrow_only_ranks_that_are_there() -> None:
    assert resolve_degrees(ParallelRecipe(expert=4), 4).expert_copies == 1
    assert resolve_degrees(ParallelRecipe(expert=2, data_replicate=2, tensor=3), 12).expert_copies == 3
    with pytest.raises(RecipeError, match=r"parallel.expert = 4: must divide .* = 6 ranks; legal: 1, 2, 3, 6$"):
        resolve_degrees(ParallelRecipe(expert=4, data_replicate=2), 12)
