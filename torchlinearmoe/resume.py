"""Which recipe may go on where another stopped, and what is worth saying when it does.

What changes neither the meaning of the weights nor which samples come next is free, so that a run goes on with less
memory, on other ranks, or faster:

    free            how long, where, how it is spread, computed, watched and saved
    free, and told  the learning rate, its schedule, the clipped norm, products in float8
    compared        data and tokenizer by what they hold, not by where they lie
    refused         everything else, by its key

Forking is the same: `checkpoint.resume` names a checkpoint, `training.output_dir` a new folder.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torchlinearmoe.checkpoint.folder import candidates, read_extra
from torchlinearmoe.checkpoint.manager import CheckpointManager
from torchlinearmoe.checkpoint.model import checkpoint_recipe, checkpoint_template, checkpoint_tokenizer
from torchlinearmoe.data.chat_template import load_template
from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.errors import RecipeError, UserError
from torchlinearmoe.optim.schedule import scheduled
from torchlinearmoe.recipe import Recipe
from torchlinearmoe.recipe.parse import flatten
from torchlinearmoe.recipe.remarks import unread, value_of

FREE_SECTIONS = ("parallel", "metrics", "checkpoint", "evaluation")
FREE_KEYS = {
    *("training.steps", "training.tokens", "training.output_dir", "training.device", "training.deterministic"),
    *("training.compile", "training.compile_backend", "training.max_skipped_steps"),
    *("training.activation_checkpointing", "training.activation_checkpointing_every"),
    *("model.kernel_backend", "model.attention_backend", "moe.backend", "model.embed_init_std"),
    *("data.workers", "data.cache", "data.on_change", "data.validation_paths"),
}
TOLD_KEYS = {
    *("optimizer.lr", "optimizer.min_lr", "optimizer.schedule", "optimizer.decay_fraction", "optimizer.clip_norm"),
    *("optimizer.warmup_steps", "optimizer.warmup_tokens", "training.float8"),
}


class Finished(Exception):
    """There is nothing to do: the run was at its end before. Says so in a few lines."""


def choose_checkpoint(
    recipe: Recipe, checkpoints: CheckpointManager, tokenizer: Tokenizer
) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, made by a recipe that this one may follow, and lines to say.

    Raises Finished where it is that of the last step.
    """
    choice, folder = recipe.checkpoint.resume, Path(recipe.training.output_dir)
    if choice == "never" and (folder / "metrics.jsonl").exists():
        raise RecipeError(
            f"checkpoint.resume = 'never': {folder} was used by another run; "
            "choose another training.output_dir or checkpoint.resume = 'latest'"
        )
    source = checkpoints.resume_from(choice)
    if source is None:
        return None, []
    extra, total = read_extra(source), recipe.training.total_steps
    notes = go_on(source, recipe, tokenizer, step=extra["step"], data_known="fingerprint" in extra.get("data", {}))
    if extra["step"] >= total:
        raise Finished(
            f"all {total} steps are done; more of them, training.steps or training.tokens, go on from "
            f"here\ncheckpoint: {source}\nnext: python -m torchlinearmoe.generate {shlex.quote(str(source))}"
        )
    return source, notes


def go_on(source: Path, recipe: Recipe, tokenizer: Tokenizer, *, step: int, data_known: bool) -> list[str]:
    """What to say when `recipe` goes on from the checkpoint `source` after `step`, a line each.

    data_known: the data are compared by themselves, wherever they lie. Raises RecipeError naming the first key that
    differs and may not.
    """
    saved = checkpoint_recipe(source)
    equal = {
        "data.paths": data_known,
        "data.sources": data_known
        and [(s.weight, s.split) for s in saved.data.sources] == [(s.weight, s.split) for s in recipe.data.sources],
        # Fewer or more documents are other data, of which the fingerprint tells.
        "data.min_length": data_known and recipe.data.on_change == "restart_epoch",
        "data.tokenizer": checkpoint_tokenizer(source).fingerprint == tokenizer.fingerprint,
        "data.chat_template": saved.data.format == recipe.data.format == "messages"
        and load_template(recipe.data.chat_template, tokenizer).source == checkpoint_template(source).source,
    }
    rewritten = ["data.tokenizer", *(["data.chat_template"] if recipe.data.format == "messages" else [])]
    for key in rewritten:
        if value_of(recipe, key) == value_of(saved, key) and not equal[key]:
            raise RecipeError(
                f"{key} = {value_of(recipe, key)!r}: has changed since the checkpoint to resume was made; name the one "
                f"that lies in {source}, or start another run in another training.output_dir"
            )
    same = {key for key, is_equal in equal.items() if is_equal}
    check_same_run(saved, recipe, same)
    return list(changes(saved, recipe, step))


def check_same_run(saved: Recipe, now: Recipe, same: Collection[str] = ()) -> None:
    """Raise RecipeError naming the first key that differs and may not. same: keys that say the same in other words."""
    before, after = flatten(saved), flatten(now)
    for table in before, after:
        # A checkpoint says so where documents begin with that token; who says nothing takes what it says.
        begins = table["data.begin_of_text"]
        table["data.begin_of_text"] = bool(before["data.begin_of_text"] if begins is None else begins)
    free = FREE_KEYS | TOLD_KEYS | set(same) | unread(now).keys() | unread(saved).keys()
    for key in sorted(before):
        if before[key] == after[key] or key in free or key.split(".")[0] in FREE_SECTIONS:
            continue
        told = f"{key} = {after[key]!r}: the checkpoint to resume was made with {before[key]!r}"
        if key == "training.micro_batch_size":
            # Equal tokens a step are another key. Whose places experts have is a matter of the micro-batch.
            moe = now.model.moe
            if not moe.num_experts or moe.capacity_factor is None:
                continue
            told += f", and moe.capacity_factor = {moe.capacity_factor} is of the tokens of a micro-batch"
        raise RecipeError(f"{told}; set it back, or start another run in another training.output_dir")


def changes(saved: Recipe, now: Recipe, step: int) -> list[str]:
    """What a run that goes on after `step` does otherwise than its recipe said before. Both are resolved."""
    before, after = flatten(saved), flatten(now)
    lines = [
        f"{key} = {after[key]!r} from here on, {before[key]!r} before"
        for key in sorted(TOLD_KEYS - unread(now).keys())
        if before[key] != after[key]
    ]
    steps, total = saved.training.total_steps, now.training.total_steps
    schedule = now.optimizer.schedule
    if steps != total and schedule != "constant" and step < total:
        was, rate = scheduled(saved, step + 1), scheduled(now, step + 1)
        if was != rate:
            key = "training.steps" if now.training.steps is not None else "training.tokens"
            done = "cut short" if total < steps else "drawn out" if step < steps else "begun again after its end"
            lines.append(
                f"{key} = {after[key]}: the {schedule} schedule of {steps} steps is {done} to {total}; the learning "
                f"rate of step {step + 1} is {rate:.3g}, it would have been {was:.3g}"
            )
    return lines


def counts_of(extra: Mapping[str, Any], source: Path) -> tuple[int, int, int]:
    """The steps, tokens and skipped steps of a run that are kept in its checkpoint `source`. Raises UserError."""
    counts = [extra.get(key) for key in ("step", "tokens", "skipped_steps")]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise UserError(
            f"checkpoint {source}: state.json counts no steps, tokens and skipped steps; name the checkpoint of a run, "
            "or start from its weights with checkpoint.init_from"
        )
    step, tokens, skipped = counts
    return step, tokens, skipped  # pyright: ignore[reportReturnType]


def with_saved_tokens_per_step(recipe: Recipe) -> Recipe:
    """The recipe with the `training.tokens_per_step` of the checkpoint that it goes on from, where it says none."""
    if recipe.training.tokens_per_step is not None:
        return recipe
    choice = recipe.checkpoint.resume
    folder = Path(recipe.training.output_dir) / "checkpoints"
    sources = {"latest": lambda: candidates(folder).complete, "never": list}.get(choice, lambda: [Path(choice)])()
    for source in sources:  # all of a run have the same; which of them are sound is found out later
        try:
            tokens = checkpoint_recipe(source).training.tokens_per_step
        except UserError:
            continue
        return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, tokens_per_step=tokens))
    return recipe
