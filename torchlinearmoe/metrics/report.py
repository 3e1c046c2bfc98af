"""What a run says in words, at its begin and its end, a line each."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from torchlinearmoe.data.baselines import Baselines
from torchlinearmoe.data.chat_template import load_template
from torchlinearmoe.data.opening import opening_of_messages, opening_of_text
from torchlinearmoe.data.splits import Splits
from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.metrics.console import format_number
from torchlinearmoe.recipe import Recipe
from torchlinearmoe.recipe.remarks import remarks

MANY_EPOCHS = 4
"""Up to about so many, repeated text is worth as much as new (Muennighoff et al. 2023, arXiv 2305.16264)."""


def beginning(
    recipe: Recipe,
    splits: Splits,
    tokenizer: Tokenizer,
    *,
    parameters: int,
    flops_per_token: float,
    devices: str,
    dtype: torch.dtype,
    resumed: Sequence[str | None],
    weights: Sequence[str],
    figures: Mapping[str, float],
) -> Iterator[str]:
    """What is run, on what data and devices.

    recipe: resolved; resumed, weights: what there is to say of the checkpoint gone on from, and of initial weights;
    figures: of the data at the last step.
    """
    training, train = recipe.training, splits.train
    length, tokens_per_step = training.sequence_length, training.tokens_per_step
    assert tokens_per_step is not None
    yield (
        f"{parameters / 1e6:.1f}M parameters, {flops_per_token / 1e9:.3f} GFLOP a token, "
        f"{tokens_per_step} tokens a step, {training.total_steps} steps on {devices} in "
        f"{str(dtype).removeprefix('torch.')}"
    )
    epochs = training.total_steps * (tokens_per_step // length) / len(train.samples(length))
    yield (
        f"{train.num_documents} documents of {format_number(len(train))} tokens, {epochs:.2g} epochs; tokenizer "
        f"{tokenizer.path.name}; in {Path(training.output_dir)}"
    )
    if epochs > MANY_EPOCHS:
        yield (
            f"the data are read {epochs:.3g} times: beyond {MANY_EPOCHS} epochs repeated text teaches less; bring "
            "more in data.paths, or take fewer steps"
        )
    for name, value in figures.items():
        source = name.removeprefix("data/epochs/")
        if source != name and value > 1:
            yield f"data.sources: {source} is read {value:.3g} times by the last step"
    yield from filter(None, [*resumed, *remarks(recipe), *weights, train.note(length)])
    if left_out := splits.left_out:
        yield f"data.paths: not read is what training wrote in {', '.join(map(str, left_out))}"
    if unknown := splits.unknown:
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(unknown).most_common(8))
        yield f"data.paths: {sum(unknown.values())} files of no known kind are not read: {kinds}"


def count_models(found: Baselines) -> str:
    """What the model is measured against."""
    return (
        f"held-out loss of count models: uniform {found.uniform:.4f}, unigram {found.unigram:.4f}, "
        f"interpolated bigram {found.bigram:.4f} nats a token"
    )


def below(baselines: Baselines, loss: float) -> str:
    """How far the model's held-out loss is below theirs."""
    return (
        f"  below uniform by {baselines.uniform - loss:.4f}, unigram by {baselines.unigram - loss:.4f}, "
        f"interpolated bigram by {baselines.bigram - loss:.4f}"
    )


def where_it_is(recipe: Recipe, splits: Splits, tokenizer: Tokenizer, checkpoint: Path) -> Iterator[str]:
    """Where a run's `checkpoint` and its curves are, and the command that asks the model for something."""
    folder = Path(recipe.training.output_dir)
    curves = f"{folder / 'metrics.jsonl'}"
    if recipe.metrics.tensorboard:
        curves += f", tensorboard --logdir {folder / 'tensorboard'}"
    yield f"checkpoint: {checkpoint}"
    yield f"curves: {curves}"
    if recipe.data.format == "recall":
        yield f"next: python -m torchlinearmoe.plot {shlex.quote(str(folder))}"
        return
    told = [shlex.quote(str(checkpoint)), *_prompt(recipe, splits, tokenizer)]
    yield f"next: python -m torchlinearmoe.generate {' '.join(told)}"


def _prompt(recipe: Recipe, splits: Splits, tokenizer: Tokenizer) -> list[str]:
    """Options of `generate` that ask the model for something like its data."""
    data, train = recipe.data, splits.train
    if data.format == "messages":
        text = opening_of_messages(train, tokenizer, load_template(data.chat_template, tokenizer))
        return ["--chat", "--prompt", shlex.quote(text or "Hello.")]
    text = opening_of_text(train, tokenizer)
    return ["--prompt", shlex.quote(text)] if text else []
