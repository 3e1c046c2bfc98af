"""Degrees that multiply to the world, and steps that are whole micro-batches."""

from typing import Any

import pytest

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.parallel.mesh import Degrees, resolve_degrees, tokens_per_step
from torchlinearmoe.recipe import ParallelRecipe, TrainingRecipe


@pytest.mark.parametrize(
    "parallel, world, data_replicate, data_shard",
    [({}, 1, 1, 1), ({}, 6, 1, 6), ({"data_replicate": 2}, 6, 2, 3), ({"data_replicate": 3, "data_shard": 2}, 6, 3, 2)],
)
def test_data_shard_takes_what_is_left(
    parallel: dict[str, Any], world: int, data_replicate: int, data_shard: int
) -> None:
    degrees = resolve_degrees(ParallelRecipe(**parallel), world)
    assert degrees == Degrees(1, data_replicate, data_shard, 1, 1, 1)
    assert degrees.world_size == degrees.data_ranks == world


def test_only_data_axes_take_batches_of_their_own_and_experts_never_multiply() -> None:
    degrees = Degrees(pipeline=2, data_replicate=3, data_shard=5, context=7, tensor=11, expert=55)
    assert degrees.world_size == 2 * 3 * 5 * 7 * 11
    assert degrees.data_ranks == 15


@pytest.mark.parametrize(
    "parallel, world, told",
    [
        ({"data_replicate": 4}, 6, "= 4 does not divide 6 ranks"),
        ({"data_shard": 4}, 6, "parallel.data_shard = 4: the degrees multiply to 4, not to 6 ranks"),
        ({"data_replicate": 2, "data_shard": 6}, 6, "parallel.data_shard = 6: the degrees multiply to 12, not to 6"),
    ],
)
def test_degrees_that_do_not_fit_are_refused(parallel: dict[str, Any], world: int, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        resolve_degrees(ParallelRecipe(**parallel), world)


def test_a_step_is_whole_micro_batches_on_every_data_rank() -> None:
    degrees = Degrees(1, 2, 3, 1, 1, 1)
    training: dict[str, Any] = {"steps": 1, "sequence_length": 10, "micro_batch_size": 4}
    assert tokens_per_step(TrainingRecipe(**training), degrees) == 240
    assert tokens_per_step(TrainingRecipe(**training, tokens_per_step=720), degrees) == 720
    with pytest.raises(
        RecipeError, match="training.tokens_per_step = 360: must be a multiple of .* = 10 x 4 x 6 = 240"
    ):
        tokens_per_step(TrainingRecipe(**training, tokens_per_step=360), degrees)
