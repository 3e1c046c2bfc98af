"""Which rank of a pipeline has which stage."""

import pytest

from torchlinearmoe.parallel.pipeline import stage_ranks
from torchlinearmoe.recipe.schema import ParallelRecipe


@pytest.mark.parametrize(
    ("schedule", "each", "expected"),
    [
        ("1f1b", 0, [0, 1]),
        ("interleaved", 0, [0, 1, 0, 1]),
        ("interleaved", 3, [0, 1, 0, 1, 0, 1]),
        ("zero_bubble", 0, [0, 1, 1, 0]),
    ],
)
def test_stages_go_round_the_ranks_or_there_and_back(schedule: str, each: int, expected: list[int]) -> None:
    parallel = ParallelRecipe(pipeline=2, pipeline_schedule=schedule, pipeline_stages_per_rank=each)  # pyright: ignore
    assert stage_ranks(parallel) == expected
