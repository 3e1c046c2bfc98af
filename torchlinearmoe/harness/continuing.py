"""Text that goes on from prompts until a stop string, an end of text, or so many tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.generation import GREEDY, Sampling, generate
from torchlinearmoe.models.decoder import Decoder

MOST_SEQUENCES = 64
"""Decoded together."""


def continue_texts(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    stops: Sequence[str] = (),
    ends: Collection[int] = (),
    sampling: Sampling = GREEDY,
    batch_tokens: int = 8192,
    done: Callable[[int], object] = lambda count: None,
) -> list[str]:
    """The text after each prompt, up to the first of `stops` in it, which is not part of it.

    ends: ids that end a text. Prompts of about one length are decoded together, as many as `batch_tokens` holds with
    their continuations; a sequence that has stopped takes no part in when the others do. `done` as in `Scorer.score`.
    """
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    while order:
        longest = len(prompts[order[0]]) + max_tokens
        count = max(1, min(MOST_SEQUENCES, batch_tokens // longest))
        batch, order = order[:count], order[count:]
        found = _continue(model, tokenizer, [prompts[i] for i in batch], max_tokens, stops, ends, sampling)
        for index, text in zip(batch, found):
            texts[index] = text
        done(len(batch))
    return texts


def _continue(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: list[Sequence[int]],
    max_tokens: int,
    stops: Sequence[str],
    ends: Collection[int],
    sampling: Sampling,
) -> list[str]:
    generation = generate(model, prompts, max_tokens, sampling=sampling, stop=ends, vocab_size=tokenizer.vocab_size)
    special = set(tokenizer.special_tokens.values())
    ids: list[list[int]] = [[] for _ in prompts]
    for chosen in generation:
        for row, token in enumerate(chosen):
            if token is None:
                continue
            if token not in special:
                ids[row].append(token)
            if stops and any(stop in tokenizer.decode(ids[row]) for stop in stops):
                generation.running[row] = False
    return [_until(tokenizer.decode(row), stops) for row in ids]


def _until(text: str, stops: Sequence[str]) -> str:
    """The text before the first place where one of the stop strings begins."""
    return text[: min([len(text), *(text.index(stop) for stop in stops if stop in text)])]
