"""Pipeline parallelism: which layers make which stage, and which rank has it.

The layers are cut into stages, consecutive runs of about equal work; the first stage has the embedding, the last the
norm and the head. A rank has one stage or several:

    2 ranks     1f1b            interleaved, 2 a rank      zero_bubble (ZB-V)
    rank 0      stage 0         stages 0 and 2             stages 0 and 3
    rank 1      stage 1         stages 1 and 3             stages 1 and 2

1F1B: Narayanan et al. 2021, arXiv 2104.04473, interleaved: section 2.2 there; ZB-V: Qi et al. 2024, arXiv 2405.15362,
which splits a backward into the gradient of the input, which the stage before waits for, and that of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.models.flops import head_flops, layer_flops
from torchlinearmoe.models.layer_mixers import layer_mixers
from torchlinearmoe.parallel.mesh import Degrees
from torchlinearmoe.recipe.schema import ModelRecipe, ParallelRecipe, Recipe


def num_stages(parallel: ParallelRecipe) -> int:
    """Stages of the whole pipeline."""
    return parallel.pipeline * parallel.stages_per_rank


def stage_ranks(parallel: ParallelRecipe) -> list[int]:
    """The pipeline rank of each stage."""
    ranks, stages = parallel.pipeline, num_stages(parallel)
    if parallel.pipeline_schedule == "zero_bubble":
        return [min(stage, stages - 1 - stage) for stage in range(stages)]
    return [stage % ranks for stage in range(stages)]


def stage_layers(recipe: Recipe) -> list[range]:
    """The layers of each stage, balanced by their forward FLOPs; the head counts with the last."""
    with torch.device("meta"):
        model = Decoder(recipe.model)
    length = recipe.training.sequence_length
    costs = [layer_flops(layer, length) for layer in model.layers.values()]
    return balanced(costs, head_flops(recipe.model), num_stages(recipe.parallel))


def balanced(costs: list[float], last: float, parts: int) -> list[range]:
    """Cut items into `parts` consecutive ranges, none empty, so that the costliest is as cheap as can be.

    last: cost of something that always lies in the last range. Of equal cuts, the one with the shortest early ranges.

    >>> balanced([1.0, 1.0, 1.0, 1.0], 2.0, 2)
    [range(0, 3), range(3, 4)]
    """
    count = len(costs)
    assert 1 <= parts <= count

    # best[n]: (cost, borders) of the first n items in as many ranges as rounds so far.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [0])}
    for part in range(1, parts + 1):
        ends = [count] if part == parts else range(part, count - (parts - part) + 1)
        following: dict[int, tuple[float, list[int]]] = {}
        for end in ends:
            extra = last if part == parts else 0.0
            following[end] = min(
                (max(cost, sum(costs[start:end]) + extra), [*borders, end])
                for start, (cost, borders) in best.items()
                if start < end
            )
        best = following
    borders = best[count][1]
    return [range(start, end) for start, end in zip(borders, borders[1:])]


def carried_between(model: ModelRecipe, layer: int) -> dict[str, int]:
    """Channels of the carried tensors that cross from layer `layer - 1` to `layer`, by name, in a fixed order."""
    names = layer_mixers(model)
    crossing: dict[str, int] = {}
    for name in dict.fromkeys(names[:layer]):
        if name in names[layer:]:
            crossing |= MIXERS[name].carried_channels(model.mixer_options[name], model)
    return dict(sorted(crossing.items()))


def passed_between(recipe: Recipe, layer: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What a micro-batch hands over between layers `layer - 1` and `layer`, as meta tensors: hidden states, carried.

    Sizes are one rank's: context-parallel ranks have their span of the tokens; of tensor-parallel ranks each has its
    tokens of the hidden states and its heads of the carried tensors.
    """
    training, parallel = recipe.training, recipe.parallel
    tokens = training.micro_batch_size * training.sequence_length // parallel.context
    shapes = [(tokens // parallel.tensor, recipe.model.hidden_size)]
    shapes += [(tokens, channels // parallel.tensor) for channels in carried_between(recipe.model, layer).values()]
    return tuple(torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for shape in shapes)


def shared_between(model: ModelRecipe, stages: list[range]) -> dict[str, list[int]]:
    """The modules that several stages have a copy of, by path, and these stages."""
    names = layer_mixers(model)
    holders: dict[str, list[int]] = {}
    if model.tie_embeddings:
        holders["embed"] = [0, len(stages) - 1]
    for name in dict.fromkeys(names):
        with torch.device("meta"):
            module = MIXERS[name].shared_module(model.mixer_options[name], model, names.count(name))
        if module is not None:
            holders[f"shared.{name}"] = [
                index for index, layers in enumerate(stages) if any(names[layer] == name for layer in layers)
            ]
    return {path: held for path, held in holders.items() if len(held) > 1}


def micro_batches(recipe: Recipe, degrees: Degrees) -> int:
    """Micro-batches of a step and data rank; `training.tokens_per_step` is resolved."""
    training = recipe.training
    assert training.tokens_per_step is not None
    return training.tokens_per_step // (training.sequence_length * training.micro_batch_size * degrees.data_ranks)


def check_micro_batches(recipe: Recipe, degrees: Degrees) -> None:
    """Raise RecipeError where the schedule cannot run as many micro-batches as a step has."""
    ranks, count, schedule = degrees.pipeline, micro_batches(recipe, degrees), recipe.parallel.pipeline_schedule
    if count < ranks:
        raise RecipeError(
            f"parallel.pipeline = {ranks}: needs at least {ranks} micro-batches a step and data rank, "
            f"training.tokens_per_step = {recipe.training.tokens_per_step} makes {count}"
        )
    if ranks > 1 and schedule == "interleaved" and count % ranks:
        raise RecipeError(
            f"parallel.pipeline_schedule = 'interleaved': training.tokens_per_step = {recipe.training.tokens_per_step} "
            f"makes {count} micro-batches a data rank, which must be a multiple of parallel.pipeline = {ranks}"
        )
