"""Log-likelihoods of continuations: how probable is `b` after `a`, and would greedy decoding say it?

    requests                      one packed stream, each a document, longest first, no padding
    a = 1 2 3   b = 4 5           [ 1 2 3 4 | 6 7 8 | ... ]        `b`'s logits are those of its last tokens' places
    a = 6 7     b = 8 9

Several continuations of one long context (the choices of a question) share it: the context is read once, its state is
copied, and each continuation goes on from there.

Shapes: T tokens, N places, D width, V vocabulary, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from torchlinearmoe.documents import Documents
from torchlinearmoe.errors import UserError
from torchlinearmoe.generation.decode import PREFILL_LOGITS, read_prompts
from torchlinearmoe.models.decoder import Decoder

T = TypeVar("T")

SHARED_LEAST = 16
"""Tokens of a context from which on it is worth a state of its own."""
MOST_STATES = 64
"""Contexts, or continuations of them, that are read together."""

Score = tuple[float, bool]
"""The log-probability of a continuation in nats, and whether each of its tokens is the most probable one."""


@dataclass(frozen=True)
class Question:
    """Ids: how probable is `continuation` after `context`?"""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Scorer:
    """Scores questions with a model in eval mode; `batch_tokens` are read at once.

    Of a question longer than `max_length` + 1 tokens the context's beginning is left out, as lm-eval does.
    """

    def __init__(self, model: Decoder, batch_tokens: int = 8192, max_length: int | None = None) -> None:
        if batch_tokens < 1:
            raise UserError(f"batch tokens = {batch_tokens}: must be at least 1")
        self.model = model.eval()
        self.batch_tokens = batch_tokens
        self.max_length = max_length or model.recipe.max_length

    @torch.inference_mode()
    def score(self, questions: Sequence[Question], done: Callable[[int], object] = lambda count: None) -> list[Score]:
        """A score for each question, in their order. `done` is told how many more are answered.

        Raises UserError for an empty context, and for a continuation that has no room.
        """
        cut = [self._cut(question) for question in questions]
        wanted = dict.fromkeys(question for question in cut if question.continuation)
        together: dict[tuple[int, ...], list[Question]] = {}
        for question in wanted:
            together.setdefault(question.context, []).append(question)
        shared = [group for group in together.values() if len(group) > 1 and len(group[0].context) >= SHARED_LEAST]
        alone = [question for question in wanted if question not in {q for group in shared for q in group}]
        found: dict[Question, Score] = {}
        for batch in _batches(alone, lambda q: len(q.context) + len(q.continuation) - 1, self.batch_tokens):
            found |= self._packed(batch)
            done(len(batch))
        for groups in _batches(shared, lambda group: len(group[0].context), self.batch_tokens, MOST_STATES):
            found |= self._shared(groups)
            done(sum(map(len, groups)))
        return [found[question] if question.continuation else (0.0, True) for question in cut]

    def _cut(self, question: Question) -> Question:
        if not question.context:
            raise UserError("context: every continuation needs at least one token before it")
        over = len(question.context) + len(question.continuation) - (self.max_length + 1)
        if over >= len(question.context):
            raise UserError(
                f"continuation of {len(question.continuation)} tokens: at most {self.max_length} fit (model.max_length)"
            )
        return Question(question.context[max(over, 0) :], question.continuation)

    def _packed(self, questions: Sequence[Question]) -> dict[Question, Score]:
        """Each a document of one stream; the last token of each is only a target."""
        tokens, borders, places, targets = [], [0], [], []
        for question in questions:
            tokens += [*question.context, *question.continuation[:-1]]
            places += range(borders[-1] + len(question.context) - 1, len(tokens))
            targets += question.continuation
            borders.append(len(tokens))
        device = self.model.embed.weight.device
        tokens_T = torch.tensor(tokens, dtype=torch.int64, device=device)
        h_TD = self.model.hidden(tokens_T, Documents.packed(borders, device=device))
        h_ND = h_TD[torch.tensor(places, device=device)]
        targets_N = torch.tensor(targets, device=device)
        rows = max(1, PREFILL_LOGITS // self.model.recipe.vocab_size)
        scores = [_judged(self.model.project(h), t) for h, t in zip(h_ND.split(rows), targets_N.split(rows))]
        return _by_question(questions, torch.cat(scores).tolist())

    def _shared(self, groups: Sequence[Sequence[Question]]) -> dict[Question, Score]:
        """Contexts once, then all continuations from copies of their states."""
        contexts = [group[0].context for group in groups]
        longest = max(len(q.context) + len(q.continuation) for group in groups for q in group)
        state = self.model.init_state(len(groups), max_length=longest)
        last_BV, state = read_prompts(self.model, contexts, state)
        found: dict[Question, Score] = {}
        asked = [(row, question) for row, group in enumerate(groups) for question in group]
        room = PREFILL_LOGITS // self.model.recipe.vocab_size
        for part in _batches(asked, lambda pair: len(pair[1].continuation), room, MOST_STATES, padded=True):
            rows, questions = [row for row, _ in part], [question for _, question in part]
            lengths = [len(question.continuation) - 1 for question in questions]
            logits = last_BV[rows][:, None]  # of the first token of each continuation
            if max(lengths):
                padded = [list(q.continuation[:-1]) + [0] * (max(lengths) - n) for q, n in zip(questions, lengths)]
                tokens = torch.tensor(padded, dtype=torch.int64, device=logits.device)
                after, _ = self.model.prefill(tokens, state.select(rows), lengths)
                logits = torch.cat([logits, after], dim=1)
            picked = torch.cat([row[: n + 1] for row, n in zip(logits, lengths)])
            targets = torch.tensor([t for q in questions for t in q.continuation], device=logits.device)
            found |= _by_question(questions, _judged(picked, targets).tolist())
        return found


def _judged(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """[N, 2] float64: log-probability of each target in nats, and 1 where it is the most probable token."""
    logits_NV = logits_NV.float()
    chosen_N = logits_NV.gather(1, targets_N[:, None])[:, 0]
    log_p_N = chosen_N.double() - logits_NV.logsumexp(1).double()
    return torch.stack([log_p_N, (logits_NV.argmax(1) == targets_N).double()], dim=1)


def _by_question(questions: Sequence[Question], judged: list[list[float]]) -> dict[Question, Score]:
    found, start = {}, 0
    for question in questions:
        own = judged[start : start + len(question.continuation)]
        found[question] = (sum(log_p for log_p, _ in own), all(greedy for _, greedy in own))
        start += len(own)
    return found


def _batches(
    items: Sequence[T], size: Callable[[T], int], limit: int, most: int = 2**31, *, padded: bool = False
) -> Iterator[list[T]]:
    """Items from large to small, as many at once as `limit` holds of their sizes, at most `most`; one always fits.

    padded: each counts as much as the largest with it.
    """
    batch: list[T] = []
    total = 0
    for item in sorted(items, key=size, reverse=True):
        more = size(batch[0]) if padded and batch else size(item)
        if batch and (total + more > limit or len(batch) == most):
            yield batch
            batch, total = [], 0
            more = size(item)
        batch.append(item)
        total += more
    if batch:
        yield batch
