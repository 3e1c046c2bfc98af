"""What a recipe says that its run does not do: keys that nothing reads in it, and values that leave nothing to do.

In a file they may stand, because the same file is read with other keys on the command line: the run says them aloud.
On the command line a key is there because somebody wants what it does: `resolve` refuses those that are not read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torchlinearmoe.families import FAMILIES
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.models.layer_feed_forwards import DENSE, NONE, feed_forwards
from torchlinearmoe.models.layer_mixers import used_mixers
from torchlinearmoe.recipe.schema import ModelRecipe, Recipe


def unread(recipe: Recipe) -> dict[str, str]:
    """The keys, `section.key`, that say something and are not read, and what each of them needs.

    Zero, false and the empty string say nothing.
    """
    model, moe, parallel = recipe.model, recipe.model.moe, recipe.parallel
    softmax = {MIXERS[name].keeps_past for name in used_mixers(model)}
    rules = (
        (_runs_its_mixer(model), "model.mixer", "an L in model.layout, and no model.mixers"),
        (not model.mixers, "model.layout", "to be without model.mixers"),
        (DENSE in feed_forwards(model), "model.ffn_hidden_size", "layers without experts"),
        ({*feed_forwards(model)} != {NONE}, "model.activation", "a layer with a feed-forward"),
        (
            model.rope_scaling != "none",
            "model.rope_factor model.rope_original_length model.rope_beta_slow model.rope_beta_fast",
            "model.rope_scaling",
        ),
        (
            True in softmax,
            "model.attention_norm_placement model.attention_scales",
            "layers of softmax attention",
        ),
        (False in softmax, "model.linear_scales", "layers of a linear mixer"),
        (not model.tie_embeddings, "model.embed_init_std", "model.tie_embeddings = false"),
        (model.rope_scaling == "yarn", "model.rope_mscale model.rope_mscale_all_dim", "model.rope_scaling = 'yarn'"),
        (moe.num_groups, "moe.top_k_groups moe.group_score", "moe.num_groups"),
        (moe.balance == "loss", "moe.balance_coefficient moe.balance_scope", "moe.balance = 'loss'"),
        (moe.balance == "bias", "moe.bias_rate", "moe.balance = 'bias'"),
        (
            moe.capacity_factor is not None or moe.eval_capacity_factor is not None,
            "moe.drop_policy",
            "moe.capacity_factor or moe.eval_capacity_factor",
        ),
        (moe.num_experts, " ".join(f"moe.{field.name}" for field in dataclasses.fields(moe)), "moe.num_experts"),
        (recipe.data.format == "messages", "data.chat_template data.trained_roles", "data.format = 'messages'"),
        (recipe.training.compile, "training.compile_backend", "training.compile = true"),
        (
            recipe.training.activation_checkpointing != "none",
            "training.activation_checkpointing_every",
            "training.activation_checkpointing",
        ),
        (recipe.optimizer.schedule == "wsd", "optimizer.decay_fraction", "optimizer.schedule = 'wsd'"),
        (recipe.optimizer.schedule != "constant", "optimizer.min_lr", "another optimizer.schedule than 'constant'"),
        (parallel.context > 1, "parallel.context_attention parallel.context_states", "parallel.context above 1"),
        (
            parallel.pipeline > 1,
            "parallel.pipeline_schedule parallel.pipeline_stages_per_rank",
            "parallel.pipeline above 1",
        ),
        (recipe.checkpoint.init_from, "checkpoint.upcycle_noise", "checkpoint.init_from"),
        (
            recipe.data.validation_fraction,
            "data.validation_split metrics.baselines metrics.mixer_ablation",
            "data.validation_fraction above 0",
        ),
        (
            recipe.data.validation_fraction
            or recipe.data.validation_paths
            or any(source.split == "validation" for source in recipe.data.sources),
            "metrics.validation_interval metrics.validation_batches metrics.validation_accuracy",
            "data.validation_fraction above 0",
        ),
        (
            recipe.evaluation.tasks,
            "evaluation.interval evaluation.num_fewshot evaluation.limit evaluation.batch_tokens",
            "evaluation.tasks",
        ),
        (recipe.data.format == "text", "data.text_key", "data.format = 'text'"),
        (
            recipe.data.format == "recall",
            "data.recall data.recall_vocabulary data.recall_fill data.recall_seed",
            "data.format = 'recall'",
        ),
    )
    return {key: needs for read, keys, needs in rules if not read for key in keys.split() if value_of(recipe, key)}


def value_of(recipe: Recipe, key: str) -> Any:
    """The value of `section.key`."""
    section, _, name = key.partition(".")
    return getattr(_section(recipe, section), name)


def not_read(recipe: Recipe, key: str, needs: str) -> str:
    """The line that says so."""
    return f"{key} = {value_of(recipe, key)!r}: not read; it needs {needs}"


def remarks(recipe: Recipe) -> Iterator[str]:
    """What the run of a resolved recipe says before it begins, a line each."""
    brought = FAMILIES[recipe.model.family].preset(recipe.model.size)
    for key, needs in unread(recipe).items():
        section, _, name = key.partition(".")
        (field,) = (field for field in dataclasses.fields(_section(recipe, section)) if field.name == name)
        usual = brought.get(section, {}).get(name, field.default)
        if field.default is not dataclasses.MISSING and usual != value_of(recipe, key):
            yield not_read(recipe, key, needs)
    moe, optimizer, training = recipe.model.moe, recipe.optimizer, recipe.training
    if moe.num_experts > 1 and moe.top_k == 1 and moe.renormalize:
        yield "moe.renormalize = true: with moe.top_k = 1 every weight is 1, and the loss teaches the router nothing"
    if moe.num_experts and moe.balance == "bias" and not moe.bias_rate:
        yield "moe.bias_rate = 0: the selection bias never moves, as with moe.balance = 'none'"
    if not optimizer.lr:
        yield "optimizer.lr = 0: the weights stay as they are"
    assert training.tokens_per_step is not None
    warmup, steps = optimizer.warmup(training.tokens_per_step), training.total_steps
    if warmup > steps:
        key = "warmup_steps" if optimizer.warmup_tokens is None else "warmup_tokens"
        yield (
            f"optimizer.{key} = {getattr(optimizer, key)}: longer than the run, which ends at {steps / warmup:.0%} of "
            f"optimizer.lr = {optimizer.lr:g}"
        )


def _section(recipe: Recipe, name: str) -> Any:
    return recipe.model.moe if name == "moe" else getattr(recipe, name)


def _runs_its_mixer(model: ModelRecipe) -> bool:
    """Whether a layer takes `model.mixer`."""
    return not model.mixers and "L" in model.layout[: model.num_layers]
