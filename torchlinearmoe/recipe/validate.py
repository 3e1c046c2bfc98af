"""Combinations that cannot run, refused where the recipe is read, before any process group exists."""

from __future__ import annotations

import dataclasses

from torchlinearmoe.errors import RecipeError, divisors, nearest
from torchlinearmoe.kernels.operator import legal_names
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.models.layer_feed_forwards import DENSE, EXPERTS, KINDS, feed_forwards
from torchlinearmoe.models.layer_mixers import LETTERS, used_mixers
from torchlinearmoe.recipe.schema import DataRecipe, ModelRecipe, MoERecipe, Recipe
from torchlinearmoe.recipe.validate_parallel import validate_parallel

LIMITS = {
    "model": {
        "num_layers": 4096,
        "hidden_size": 2**18,
        "num_heads": 2**14,
        "num_kv_heads": 2**14,
        "head_dim": 2**14,
        "ffn_hidden_size": 2**22,
        "vocab_size": 2**24,
        "max_length": 2**30,
    },
    "moe": {
        "num_experts": 2**16,
        "hidden_size": 2**22,
        "latent_size": 2**18,
        "shared_hidden_size": 2**22,
        "capacity_factor": 2**16,
        "eval_capacity_factor": 2**16,
    },
    "training": {"sequence_length": 2**30, "micro_batch_size": 2**20},
    "data": {"workers": 4096},
}
"""Far above any model there is, and low enough that counting, planning and describing a model come to an end."""
MIXER_LIMITS = {"window": 2**30, "expand": 64, "expand_k": 64, "expand_v": 64, "num_memories": 256}
MIXER_LIMIT = 2**14
"""Of any other whole number among a mixer's options."""


def validate(recipe: Recipe) -> None:
    """Raise RecipeError for the first field that cannot be honoured."""
    _backends(recipe)
    _bounded(recipe)
    _positive(recipe)
    _layers(recipe)
    _model(recipe)
    _moe(recipe)
    _budget(recipe)
    validate_parallel(recipe)


def check_steps(recipe: Recipe) -> None:
    """Raise RecipeError for a step to look at that the run does not reach. Needs `training.tokens_per_step`."""
    metrics, last = recipe.metrics, recipe.training.total_steps
    for name, value, first in (
        ("profile_steps", list(metrics.profile_steps), metrics.profile_steps[0] if metrics.profile_steps else 0),
        ("memory_snapshot_step", metrics.memory_snapshot_step, metrics.memory_snapshot_step or 0),
    ):
        if first > last:
            raise RecipeError(f"metrics.{name} = {value}: the run ends with step {last}; name an earlier one")


def _backends(recipe: Recipe) -> None:
    """The folder of an operator says which names there are."""
    for key, value in (
        ("model.attention_backend", recipe.model.attention_backend),
        ("model.kernel_backend", recipe.model.kernel_backend),
        ("moe.backend", recipe.model.moe.backend),
    ):
        if value not in (legal := legal_names(key)):
            raise RecipeError(f"{key} = {value!r}: not a legal value; {nearest(value, legal)}")


def _bounded(recipe: Recipe) -> None:
    model = recipe.model
    for section, owner in (
        ("model", model),
        ("moe", model.moe),
        ("training", recipe.training),
        ("data", recipe.data),
    ):
        for name, limit in LIMITS[section].items():
            _at_most(f"{section}.{name}", getattr(owner, name), limit)
    for mixer, options in model.mixer_options.items():
        for field in dataclasses.fields(options):
            value = getattr(options, field.name)
            limit = MIXER_LIMITS.get(field.name, MIXER_LIMIT if type(value) is int else None)
            if limit is not None:
                _at_most(f"mixer.{mixer}.{field.name}", value, limit)
    for name in ("layout", "mixers", "feed_forwards"):
        length = len(getattr(model, name))
        if length > LIMITS["model"]["num_layers"]:
            raise RecipeError(f"model.{name}: names {length} layers; at most {LIMITS['model']['num_layers']}")


def _at_most(key: str, value: float | None, limit: int) -> None:
    if value is not None and value > limit:
        raise RecipeError(f"{key} = {value}: must be at most {limit}")


def _positive(recipe: Recipe) -> None:
    model, training = recipe.model, recipe.training
    for section, owner, names in (
        ("model", model, "hidden_size num_layers num_heads num_kv_heads head_dim vocab_size max_length"),
        ("training", training, "sequence_length micro_batch_size activation_checkpointing_every max_skipped_steps"),
        ("metrics", recipe.metrics, "interval memory_snapshot_step"),
        ("checkpoint", recipe.checkpoint, "keep"),
        ("evaluation", recipe.evaluation, "batch_tokens"),
    ):
        for name in names.split():
            value = getattr(owner, name)
            if value is not None and value < 1:
                raise RecipeError(f"{section}.{name} = {value}: must be at least 1")
    for section, owner, names in (
        ("model", model, "rope_theta norm_eps init_std embed_init_std rope_beta_slow rope_beta_fast"),
        ("model", model, "embed_scale residual_scale logit_divisor"),
        ("optimizer", recipe.optimizer, "eps"),
        ("metrics", recipe.metrics, "peak_tflops"),
        ("moe", model.moe, "routed_scaling capacity_factor eval_capacity_factor"),
    ):
        for name in names.split():
            value = getattr(owner, name)
            if value is not None and value <= 0:
                raise RecipeError(f"{section}.{name} = {value}: must be positive")
    for section, owner, names in (
        ("model", model, "ffn_hidden_size rope_mscale rope_mscale_all_dim"),
        ("training", training, "seed"),
        ("checkpoint", recipe.checkpoint, "interval upcycle_noise"),
        ("metrics", recipe.metrics, "validation_interval validation_batches"),
        ("evaluation", recipe.evaluation, "interval"),
        ("data", recipe.data, "workers min_length"),
        ("optimizer", recipe.optimizer, "lr min_lr weight_decay clip_norm"),
        ("parallel", recipe.parallel, "pipeline_stages_per_rank"),
        ("moe", model.moe, "num_experts top_k hidden_size latent_size shared_hidden_size"),
        ("moe", model.moe, "num_groups top_k_groups first_dense_layers"),
        ("moe", model.moe, "balance_coefficient z_loss_coefficient bias_rate"),
    ):
        for name in names.split():
            if getattr(owner, name) < 0:
                raise RecipeError(f"{section}.{name} = {getattr(owner, name)}: must not be negative")
    if not training.output_dir:
        raise RecipeError("training.output_dir = '': name the folder of the run, e.g. 'runs/default'")
    for key, value in (
        *(("data.paths", path) for path in recipe.data.paths),
        *(("data.sources", source.path) for source in recipe.data.sources),
        *(("data.validation_paths", path) for path in recipe.data.validation_paths),
        *((f"data.{name}", getattr(recipe.data, name)) for name in ("tokenizer", "cache", "chat_template")),
        ("training.output_dir", training.output_dir),
        *((f"checkpoint.{name}", getattr(recipe.checkpoint, name)) for name in ("resume", "init_from")),
    ):
        if "\0" in value:
            raise RecipeError(f"{key} = {value!r}: no path holds a zero byte; take it out")
    if "" in recipe.data.paths:
        raise RecipeError(
            f"data.paths = {list(recipe.data.paths)}: a path is empty; name files or folders, or leave data.paths out "
            "for the text that ships"
        )
    if not 0 <= recipe.data.validation_fraction < 1:
        raise RecipeError(
            f"data.validation_fraction = {recipe.data.validation_fraction}: must be at least 0, for no validation, and "
            "below 1"
        )
    _sources(recipe)
    _recall(recipe)
    _evaluation(recipe)
    if recipe.data.min_length and recipe.data.validation_fraction and recipe.data.validation_split == "tokens":
        raise RecipeError("data.min_length: leaves out whole documents; set data.validation_split = 'documents'")
    roles = recipe.data.trained_roles
    if not roles or "" in roles or len(set(roles)) < len(roles):
        raise RecipeError(f"data.trained_roles = {list(roles)}: name each role once that is trained, one at least")
    if recipe.data.format != "text" and recipe.data.validation_split == "tokens":
        held_out = "conversations" if recipe.data.format == "messages" else "documents of recall"
        raise RecipeError(f"data.validation_split = 'tokens': {held_out} are held out whole; set it to 'documents'")
    if recipe.data.format != "text" and recipe.metrics.baselines:
        raise RecipeError(
            f"metrics.baselines = true: there are no count models of {recipe.data.format}; set it to false"
        )
    if not 0 < recipe.optimizer.decay_fraction <= 1:
        raise RecipeError(f"optimizer.decay_fraction = {recipe.optimizer.decay_fraction}: must lie in (0, 1]")
    if not all(0 <= beta < 1 for beta in recipe.optimizer.betas):
        raise RecipeError(f"optimizer.betas = {list(recipe.optimizer.betas)}: both must lie in [0, 1)")
    profile = recipe.metrics.profile_steps
    if profile and (len(profile) != 2 or not 1 <= profile[0] <= profile[1]):
        raise RecipeError(f"metrics.profile_steps = {list(profile)}: must be [first, last]")


def _sources(recipe: Recipe) -> None:
    data = recipe.data
    if not data.text_key:
        raise RecipeError("data.text_key = '': name the key of the text, e.g. 'text' or 'content.text'")
    for name in ("sources", "validation_paths"):
        if "" in [getattr(entry, "path", entry) for entry in getattr(data, name)]:
            raise RecipeError(f"data.{name}: a path is empty; name a file or folder, or take the entry out")
    for source in data.sources:
        if source.weight <= 0:
            raise RecipeError(f"data.sources: weight = {source.weight} of '{source.path}': must be positive")
    if not data.sources:
        return
    if data.paths:
        raise RecipeError("data.paths and data.sources exclude each other; give one")
    if all(source.split == "validation" for source in data.sources):
        raise RecipeError("data.sources: every split = 'validation'; leave one to train on")
    if data.format == "messages":
        raise RecipeError("data.sources: mixtures are of text; name messages in data.paths")
    if data.validation_split == "tokens":
        raise RecipeError("data.validation_split = 'tokens': sources hold out whole documents; set it to 'documents'")


def _evaluation(recipe: Recipe) -> None:
    evaluation = recipe.evaluation
    if "" in evaluation.tasks:
        raise RecipeError(f"evaluation.tasks = {list(evaluation.tasks)}: a name is empty; take it out")
    if evaluation.tasks and recipe.data.format == "recall":
        raise RecipeError("evaluation.tasks: a model of recall knows no text; leave them out")
    if evaluation.limit is not None and evaluation.limit <= 0:
        raise RecipeError(f"evaluation.limit = {evaluation.limit}: must be positive, or left out for all questions")
    if evaluation.num_fewshot is not None and evaluation.num_fewshot < 0:
        raise RecipeError(f"evaluation.num_fewshot = {evaluation.num_fewshot}: must not be negative")


def _recall(recipe: Recipe) -> None:
    data, length = recipe.data, recipe.training.sequence_length
    if data.format != "recall":
        return
    if not data.recall:
        raise RecipeError(
            "data.recall = []: names no documents; with data.format = 'recall' give {pairs = ..., length = ...}"
        )
    for name in ("paths", "sources", "validation_paths"):
        if getattr(data, name):
            raise RecipeError(f"data.{name}: data.format = 'recall' makes its own documents; take it out")
    for name in ("min_length", "packing"):
        if getattr(data, name) != getattr(DataRecipe(), name):
            raise RecipeError(f"data.{name}: documents of recall fill their sequences; take it out")
    if not 4 <= data.recall_vocabulary <= recipe.model.vocab_size:
        raise RecipeError(
            f"data.recall_vocabulary = {data.recall_vocabulary}: must lie between 4 and model.vocab_size = "
            f"{recipe.model.vocab_size}"
        )
    if data.recall_seed < 0:
        raise RecipeError(f"data.recall_seed = {data.recall_seed}: must not be negative")
    keys = data.recall_vocabulary // 2 - 1
    for entry in data.recall:
        told = f"data.recall: {entry.pairs} pairs in {entry.length} tokens"
        if not 1 <= entry.pairs <= keys:
            raise RecipeError(f"{told}: data.recall_vocabulary = {data.recall_vocabulary} has keys for 1 to {keys}")
        if entry.length < 4 * entry.pairs or entry.length % 2:
            raise RecipeError(f"{told}: a length must be even and at least four times the pairs")
        if length % entry.length:
            raise RecipeError(
                f"{told}: the length must divide training.sequence_length = {length}; legal: {divisors(length)}"
            )
        if not 1 <= entry.examples < 2**32:
            raise RecipeError(f"{told}: examples = {entry.examples}: must lie between 1 and {2**32 - 1}")
    if len({(entry.pairs, entry.length) for entry in data.recall}) < len(data.recall):
        raise RecipeError("data.recall: two entries have the same pairs and length; make them one")


def _layers(recipe: Recipe) -> None:
    model = recipe.model
    if not model.layout or set(model.layout).difference(LETTERS):
        raise RecipeError(f"model.layout = '{model.layout}': must be a non-empty string over {', '.join(LETTERS)}")
    if not model.feed_forwards or set(model.feed_forwards).difference(KINDS):
        raise RecipeError(
            f"model.feed_forwards = '{model.feed_forwards}': must be a non-empty string over {', '.join(KINDS)}"
        )
    if model.mixer not in MIXERS:
        raise RecipeError(f"model.mixer = '{model.mixer}': unknown mixer; {nearest(model.mixer, MIXERS.names())}")
    for index, name in enumerate(model.mixers):
        if name not in MIXERS:
            raise RecipeError(f"model.mixers[{index}] = '{name}': unknown mixer; {nearest(name, MIXERS.names())}")
    if model.mixers and len(model.mixers) != model.num_layers:
        raise RecipeError(
            f"model.num_layers = {model.num_layers}: model.mixers names {len(model.mixers)} layers; make them equal"
        )


def _model(recipe: Recipe) -> None:
    model = recipe.model
    for name in ("linear_scales", "attention_scales", "ffn_scales"):
        if min(scales := getattr(model, name)) <= 0:
            raise RecipeError(f"model.{name} = {list(scales)}: both must be positive")
    if model.num_heads % model.num_kv_heads:
        raise RecipeError(f"model.num_kv_heads = {model.num_kv_heads}: must divide model.num_heads = {model.num_heads}")
    if model.ffn_hidden_size < 1 and DENSE in feed_forwards(model):
        raise RecipeError(f"model.ffn_hidden_size = {model.ffn_hidden_size}: must be at least 1 in dense layers")
    _rope(model)
    for name in used_mixers(model):
        MIXERS[name].check(model.mixer_options[name], model)


def _rope(model: ModelRecipe) -> None:
    if model.rope_scaling == "none":
        return
    if model.rope_theta <= 1:
        raise RecipeError(f"model.rope_theta = {model.rope_theta}: must be above 1 with model.rope_scaling")
    if model.rope_factor < 1:
        raise RecipeError(f"model.rope_factor = {model.rope_factor}: must be at least 1 with model.rope_scaling")
    if model.rope_original_length < 1:
        raise RecipeError(f"model.rope_original_length = {model.rope_original_length}: must be at least 1")
    if model.rope_beta_slow >= model.rope_beta_fast:
        raise RecipeError(
            f"model.rope_beta_slow = {model.rope_beta_slow}: must be below model.rope_beta_fast = "
            f"{model.rope_beta_fast}"
        )


def _moe(recipe: Recipe) -> None:
    moe, layers = recipe.model.moe, recipe.model.num_layers
    if not moe.num_experts:
        return
    if moe.first_dense_layers >= layers:
        raise RecipeError(
            f"moe.first_dense_layers = {moe.first_dense_layers}: must leave some of model.num_layers = {layers} to the "
            "experts; or set moe.num_experts = 0"
        )
    if EXPERTS not in feed_forwards(recipe.model):
        raise RecipeError(
            f"model.feed_forwards = '{recipe.model.feed_forwards}': leaves no layer to the experts; put an E behind "
            "moe.first_dense_layers, or set moe.num_experts = 0"
        )
    if not 1 <= moe.top_k <= moe.num_experts:
        raise RecipeError(f"moe.top_k = {moe.top_k}: must lie between 1 and moe.num_experts = {moe.num_experts}")
    _groups(moe)
    if moe.hidden_size < 1:
        raise RecipeError(f"moe.hidden_size = {moe.hidden_size}: must be at least 1 with experts")
    if moe.shared_gate and not moe.shared_hidden_size:
        raise RecipeError("moe.shared_gate = true: needs a shared expert; set moe.shared_hidden_size")


def _groups(moe: MoERecipe) -> None:
    groups = moe.num_groups
    if not groups:
        return
    if moe.num_experts % groups:
        raise RecipeError(f"moe.num_groups = {groups}: must divide moe.num_experts = {moe.num_experts}; 0 for none")
    if not 1 <= moe.top_k_groups <= groups:
        raise RecipeError(f"moe.top_k_groups = {moe.top_k_groups}: must lie between 1 and moe.num_groups = {groups}")
    if moe.group_score == "top2" and moe.num_experts < 2 * groups:
        raise RecipeError(f"moe.group_score = 'top2': a group has one expert; set moe.num_groups below {groups}")
    within = moe.top_k_groups * (moe.num_experts // groups)
    if moe.top_k > within:
        raise RecipeError(f"moe.top_k = {moe.top_k}: the {moe.top_k_groups} groups of a token have {within} experts")


def _budget(recipe: Recipe) -> None:
    training, optimizer = recipe.training, recipe.optimizer
    if (training.steps is None) == (training.tokens is None):
        raise RecipeError("training.steps or training.tokens: give exactly one")
    for section, name, value in (
        ("training", "steps", training.steps),
        ("training", "tokens", training.tokens),
        ("training", "tokens_per_step", training.tokens_per_step),
    ):
        if value is not None and value < 1:
            raise RecipeError(f"{section}.{name} = {value}: must be at least 1")
    for name in ("warmup_steps", "warmup_tokens"):
        value = getattr(optimizer, name)
        if value is not None and value < 0:
            raise RecipeError(f"optimizer.{name} = {value}: must not be negative")
    if optimizer.min_lr > optimizer.lr and optimizer.schedule != "constant":
        raise RecipeError(f"optimizer.min_lr = {optimizer.min_lr}: must not exceed optimizer.lr = {optimizer.lr}")
