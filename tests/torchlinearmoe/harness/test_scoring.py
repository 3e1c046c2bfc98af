"""Scores are those of the plain forward of each question alone, however they are packed or shared."""

import pytest
import torch

from torchlinearmoe import build_model
from torchlinearmoe.errors import UserError
from torchlinearmoe.harness import scoring
from torchlinearmoe.harness.scoring import Question, Score, Scorer
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.recipe import resolve

VOCABULARY = 50


@pytest.fixture(scope="module", params=["hgrn2/LN", "gated_delta_net/L"])
def model(request: pytest.FixtureRequest) -> Decoder:
    mixer, layout = request.param.split("/")
    sizes = {"hidden_size": 32, "num_heads": 2, "num_kv_heads": 1, "vocab_size": VOCABULARY, "max_length": 64}
    table = {"mixer": mixer, "layout": layout, "num_layers": 2, "init_std": 0.3, **sizes}
    moe = {"num_experts": 4, "top_k": 2, "hidden_size": 16}
    return build_model(resolve({"model": table, "moe": moe, "training": {"steps": 1}}).model).eval()


def ids(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist())


def by_hand(model: Decoder, question: Question) -> Score:
    whole = [*question.context, *question.continuation]
    log_p = model(torch.tensor([whole[:-1]]))[0].double().log_softmax(-1)
    places = range(len(question.context) - 1, len(whole) - 1)
    score = sum(log_p[place, token].item() for place, token in zip(places, question.continuation))
    return score, all(int(log_p[place].argmax()) == token for place, token in zip(places, question.continuation))


def check(found: list[Score], expected: list[Score]) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=2e-5)


@torch.no_grad()
def greedy_continuation(model: Decoder, context: tuple[int, ...], length: int) -> tuple[int, ...]:
    whole = list(context)
    for _ in range(length):
        whole.append(int(model(torch.tensor([whole]))[0, -1].argmax()))
    return tuple(whole[len(context) :])


def questions(model: Decoder) -> list[Question]:
    """Of all lengths, some asked twice; four choices of two long contexts, one of them the greedy one; one of none."""
    found = [Question(ids(a, a), ids(b, 100 + b)) for a, b in ((1, 1), (7, 3), (30, 1), (2, 20), (7, 3))]
    for seed, length in ((1, 20), (2, 33)):
        context = ids(length, seed)
        found += [Question(context, ids(n, 10 * seed + n)) for n in (1, 1, 4, 9)]
        found.append(Question(context, greedy_continuation(model, context, 3)))
    return found


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
@torch.no_grad()
def test_scores_are_those_of_each_question_alone(model: Decoder, batch_tokens: int) -> None:
    asked = questions(model)
    told: list[int] = []
    found = Scorer(model, batch_tokens).score(asked, told.append)
    check(found, [by_hand(model, question) for question in asked])
    assert any(greedy for _, greedy in found) and sum(told) == len(set(asked))


@torch.no_grad()
def test_a_long_context_of_several_continuations_is_read_once(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = scoring.read_prompts

    def watched(model: Decoder, prompts: list[tuple[int, ...]], state):
        read.extend(map(len, prompts))
        return real(model, prompts, state)

    monkeypatch.setattr(scoring, "read_prompts", watched)
    monkeypatch.setattr(scoring, "MOST_STATES", 3)  # the continuations in several batches
    asked = questions(model)
    check(Scorer(model).score(asked), [by_hand(model, question) for question in asked])
    assert sorted(read) == [20, 33]


@torch.no_grad()
def test_logits_are_made_in_pieces(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "PREFILL_LOGITS", 5 * VOCABULARY)
    asked = questions(model)
    check(Scorer(model).score(asked), [by_hand(model, question) for question in asked])


@torch.no_grad()
def test_a_context_that_is_too_long_loses_its_beginning(model: Decoder) -> None:
    question = Question(ids(30, 3), ids(4, 4))
    (found,) = Scorer(model, max_length=10).score([question])
    check([found], [by_hand(model, Question(question.context[-7:], question.continuation))])


def test_nothing_is_certain_and_what_has_no_room_is_told(model: Decoder) -> None:
    scorer = Scorer(model, max_length=10)
    assert scorer.score([Question((1,), ())]) == [(0.0, True)] and scorer.score([]) == []
    with pytest.raises(UserError, match="needs at least one token before it"):
        scorer.score([Question((), (1,))])
    with pytest.raises(UserError, match="continuation of 11 tokens: at most 10 fit"):
        scorer.score([Question((1, 2), ids(11, 1))])
