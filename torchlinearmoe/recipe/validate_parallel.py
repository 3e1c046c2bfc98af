"""Layouts over ranks that a recipe cannot have: degrees that do not divide, schedules that do not fit."""

from __future__ import annotations

from torchlinearmoe.errors import RecipeError, divisors
from torchlinearmoe.kernels.experts import OPERATOR as experts_operator
from torchlinearmoe.kernels.grouped_mm import OPERATOR as products_operator
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.models.layer_feed_forwards import DENSE, feed_forwards
from torchlinearmoe.models.layer_mixers import used_mixers
from torchlinearmoe.recipe.schema import Recipe


def validate_parallel(recipe: Recipe) -> None:
    """Raise RecipeError for the first degree or schedule that the model or the training does not go with."""
    parallel, experts = recipe.parallel, recipe.model.moe.num_experts
    for name in ("data_replicate", "tensor", "context", "expert", "pipeline"):
        if getattr(parallel, name) < 1:
            raise RecipeError(f"parallel.{name} = {getattr(parallel, name)}: must be at least 1")
    if parallel.pipeline > 1:
        _pipeline(recipe)
    if parallel.data_shard < 1 and parallel.data_shard != -1:
        raise RecipeError(f"parallel.data_shard = {parallel.data_shard}: must be at least 1, or -1 for what is left")
    if parallel.expert > 1 and not experts:
        raise RecipeError(f"parallel.expert = {parallel.expert}: there are no experts (moe.num_experts = 0); legal: 1")
    apart = {*experts_operator.find_backends()} - {*products_operator.find_backends(), "torch"}
    backend = recipe.model.moe.backend
    if parallel.expert > 1 and backend in apart:
        raise RecipeError(
            f"moe.backend = '{backend}': computes experts that lie on one rank, parallel.expert = {parallel.expert} "
            "spreads them; use 'auto' or 'grouped_mm'"
        )
    activation = recipe.model.activation
    if experts and backend in apart and activation not in ("swiglu", *experts_operator.find_backends()[backend].kinds):
        raise RecipeError(
            f"moe.backend = '{backend}': computes gated experts alone, model.activation = '{activation}' has no gates; "
            "use 'auto' or 'grouped_mm'"
        )
    if experts % parallel.expert:
        raise RecipeError(
            f"parallel.expert = {parallel.expert}: must divide moe.num_experts = {experts}; legal: {divisors(experts)}"
        )
    if parallel.context > 1:
        _context(recipe)
    if parallel.tensor > 1:
        _tensor(recipe)


def _context(recipe: Recipe) -> None:
    """Spans must be equal, and heads must come out even where they are traded for spans."""
    model, length, parallel = recipe.model, recipe.training.sequence_length, recipe.parallel
    if length % parallel.context:
        raise RecipeError(
            f"parallel.context = {parallel.context}: must divide training.sequence_length = {length}; "
            f"legal: {divisors(length)}"
        )
    for name in used_mixers(model) if parallel.context_attention == "heads" else ():
        if MIXERS[name].keeps_past:
            groups, count = MIXERS[name].head_groups(model.mixer_options[name], model)
            if count % (parallel.context * parallel.tensor):
                raise RecipeError(
                    f"parallel.context_attention = 'heads': context x tensor = {parallel.context} x {parallel.tensor} "
                    f"must divide {groups} of {name} = {count}; use 'gather', or legal: {divisors(count)}"
                )


def _tensor(recipe: Recipe) -> None:
    """What tensor-parallel ranks share out must come out even."""
    model, training, degree = recipe.model, recipe.training, recipe.parallel.tensor
    tokens = training.sequence_length * training.micro_batch_size // recipe.parallel.context
    shared_out = [("model.vocab_size", model.vocab_size), ("tokens of a micro-batch and context-parallel rank", tokens)]
    for name in used_mixers(model):
        groups, count = MIXERS[name].head_groups(model.mixer_options[name], model)
        shared_out.append((f"{groups} of {name}", count))
    if DENSE in feed_forwards(model):
        shared_out.append(("model.ffn_hidden_size", model.ffn_hidden_size))
    if model.moe.num_experts:
        shared_out.append(("moe.shared_hidden_size", model.moe.shared_hidden_size))
    legal = divisors(*(count for _, count in shared_out))  # of all of them
    for name, count in shared_out:
        if count % degree:
            raise RecipeError(f"parallel.tensor = {degree}: must divide {name} = {count}; legal: {legal}")


def _pipeline(recipe: Recipe) -> None:
    parallel, layers = recipe.parallel, recipe.model.num_layers
    schedule, each = parallel.pipeline_schedule, parallel.pipeline_stages_per_rank
    legal = {"1f1b": each in (0, 1), "interleaved": each == 0 or each > 1, "zero_bubble": each in (0, 2)}
    if not legal[schedule]:
        wanted = {"1f1b": "1", "interleaved": "at least 2", "zero_bubble": "2"}[schedule]
        raise RecipeError(
            f"parallel.pipeline_stages_per_rank = {each}: pipeline_schedule = '{schedule}' needs {wanted}; "
            "0 takes what it needs"
        )
    most = layers // parallel.stages_per_rank
    if parallel.pipeline > most:
        raise RecipeError(
            f"parallel.pipeline = {parallel.pipeline}: {parallel.stages_per_rank} stages a rank need at least "
            f"{parallel.pipeline * parallel.stages_per_rank} layers, model.num_layers = {layers}; legal: 1 to {most}"
        )
    if schedule == "zero_bubble":
        if recipe.training.compile:
            raise RecipeError(
                "parallel.pipeline_schedule = 'zero_bubble': torch cannot split the backward of compiled regions; "
                "set training.compile = false or take '1f1b' or 'interleaved'"
            )
        if recipe.training.activation_checkpointing != "none":
            raise RecipeError(
                "parallel.pipeline_schedule = 'zero_bubble': both parts of a backward would run the layers again, the "
                "second once a weight; set training.activation_checkpointing = 'none' or take '1f1b' or 'interleaved'"
            )
        if parallel.reshard_after_forward:
            raise RecipeError(
                "parallel.pipeline_schedule = 'zero_bubble': the weights must stay gathered between the parts of a "
                "backward; set parallel.reshard_after_forward = false"
            )
