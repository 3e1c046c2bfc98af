"""One model of a sweep: trained on recall, asked about documents that it has not seen.

Documents are drawn once for all models. Only where something is asked does a hidden state meet
the vocabulary. Everything is float32.

Shapes: S sequences of L tokens, T tokens of a step, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchlinearmoe.data.packing import IGNORED
from torchlinearmoe.data.recall import HELD_OUT, Recall, open_recall
from torchlinearmoe.documents import Documents
from torchlinearmoe.generation import state_bytes
from torchlinearmoe.models.decoder import Decoder, build_model
from torchlinearmoe.optim.build import build_optimizer
from torchlinearmoe.optim.schedule import scheduled, set_learning_rate
from torchlinearmoe.optim.step import step_if_finite
from torchlinearmoe.recall.cases import Case
from torchlinearmoe.recipe.schema import DataRecipe, RecallRecipe

CHECKS = 40
"""Looks at the accuracy during training, to end it early."""
LOOK = 64
"""Documents of each test in a look."""
TEST_TOKENS = 1 << 15
"""Asked at once."""


@dataclass(frozen=True)
class Outcome:
    """What became of a model."""

    accuracy: float
    """Mean over all test documents."""
    tests: list[dict[str, Any]]
    """`pairs`, `length` and `accuracy` of each test."""
    steps: int
    ended: str
    """`finished`; `enough`, before the last step; or `diverged`."""
    parameters: int
    state_elements: int
    """Numbers that decoding keeps of a sequence, in all layers."""
    state_bytes: int
    seconds: float


@dataclass
class Trained:
    """All training sequences, on the host."""

    tokens: np.ndarray
    """int32 [S, L]"""
    labels: np.ndarray
    lengths: np.ndarray
    """int64 [S]: tokens of each document in it."""
    order: Any = field(repr=False)

    def step(self, number: int, rows: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Tokens and labels [T] of step `number` from 0 on, and the borders of its documents."""
        chosen = [self.order[number * rows + row] for row in range(rows)]
        width = self.tokens.shape[1]
        starts = [row * width + at for row, s in enumerate(chosen) for at in range(0, width, int(self.lengths[s]))]
        return self.tokens[chosen].ravel(), self.labels[chosen].ravel(), [*starts, rows * width]


@cache
def draw_trained(data: DataRecipe, length: int, seed: int) -> Trained:
    """Every training sequence of `length` tokens."""
    samples = open_recall(data).train.samples(length)
    shape = (len(samples), length)
    tokens, labels = np.empty(shape, np.int32), np.empty(shape, np.int32)
    lengths = np.empty(len(samples), np.int64)
    for index in range(len(samples)):
        sample = samples[index]
        tokens[index], labels[index] = sample.tokens, sample.labels
        lengths[index] = sample.starts[1] if len(sample.starts) > 1 else length
    return Trained(tokens, labels, lengths, samples.order(seed))


@cache
def draw_test(recall: Recall, test: RecallRecipe) -> tuple[Tensor, Tensor]:
    """Tokens and labels of held-out documents, int64 [examples, length]."""
    drawn = [recall.draw(test, number, HELD_OUT) for number in range(test.examples)]
    tokens, labels = (torch.from_numpy(np.stack(some)) for some in zip(*drawn))
    return tokens, labels


def learn(
    case: Case,
    tests: Sequence[RecallRecipe],
    enough: float,
    device: torch.device,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Train a model and ask it; `tell` is called with (steps done, steps in all)."""
    begun = time.perf_counter()
    recipe = case.recipe
    training, optimizer_recipe = recipe.training, recipe.optimizer
    assert training.tokens_per_step is not None
    data = draw_trained(recipe.data, training.sequence_length, training.seed)
    rows, steps = training.tokens_per_step // training.sequence_length, training.total_steps
    with torch.device(device):
        model = build_model(recipe.model, training.seed)
    optimizer = build_optimizer(
        model,
        lr=optimizer_recipe.lr,
        betas=optimizer_recipe.betas,
        eps=optimizer_recipe.eps,
        weight_decay=optimizer_recipe.weight_decay,
        states=optimizer_recipe.states,
        seed=training.seed,
    )
    recall = Recall(recipe.data.recall_vocabulary, recipe.data.recall_fill, recipe.data.recall_seed)
    asked = [(test, *draw_test(recall, test)) for test in tests]
    every, ended, step = max(1, steps // CHECKS), "finished", 0
    broken = torch.zeros((), device=device)
    for step in range(1, steps + 1):
        loss = _loss(model, *data.step(step - 1, rows), device)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        set_learning_rate(optimizer, scheduled(recipe, step))
        broken = (broken + 1) * step_if_finite(optimizer, norm + 0 * loss.detach(), optimizer_recipe.clip_norm)
        optimizer.zero_grad()
        if step % every == 0:
            tell(step, steps)
            if broken >= training.max_skipped_steps:
                ended = "diverged"
                break
            if step < steps and _mean(_ask(model, asked, device, LOOK)) >= enough:
                ended = "enough"
                break
    found = _ask(model, asked, device)
    state = model.init_state(1, max(test.length for test in tests))
    return Outcome(
        accuracy=_mean(found),
        tests=[{"pairs": t.pairs, "length": t.length, "accuracy": a} for (t, _, _), (_, a) in zip(asked, found)],
        steps=step,
        ended=ended,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        state_elements=sum(value.numel() for layer in state.layers for value in layer.values()),
        state_bytes=state_bytes(state),
        seconds=round(time.perf_counter() - begun, 2),
    )


def _loss(model: Decoder, tokens: np.ndarray, labels: np.ndarray, borders: list[int], device: torch.device) -> Tensor:
    """The mean cross entropy of what is asked."""
    places = np.flatnonzero(labels != IGNORED)
    h_TD = model.hidden(_put(tokens, device), Documents.packed(borders, device=device))
    h_ND = h_TD[_put(places, device)]
    return model.project(h_ND, _put(labels[places], device)) / len(places)


@torch.no_grad()
def _ask(
    model: Decoder, asked: Sequence[tuple[RecallRecipe, Tensor, Tensor]], device: torch.device, most: int | None = None
) -> list[tuple[int, float]]:
    """Documents and accuracy of each test, of at most `most` of its documents."""
    model.eval()
    found = []
    for test, tokens, labels in asked:
        hits = torch.zeros((), device=device)
        count = len(tokens[:most])
        size = max(1, TEST_TOKENS // test.length)
        for some, answers in zip(tokens[:most].split(size), labels[:most].split(size)):
            h_TD = model.hidden(some.flatten().to(device), Documents.batch(*some.shape, device=device))
            places = (answers.flatten() != IGNORED).nonzero()[:, 0]
            chosen = model.project(h_TD[places.to(device)]).argmax(-1)
            hits += (chosen == answers.flatten()[places].to(device)).sum()
        found.append((count, hits.item() / (count * test.pairs)))
    model.train()
    return found


def _mean(found: Sequence[tuple[int, float]]) -> float:
    return sum(count * accuracy for count, accuracy in found) / sum(count for count, _ in found)


def _put(values: np.ndarray, device: torch.device) -> Tensor:
    """int64 on the device."""
    host = torch.from_numpy(values.astype(np.int64))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
