"""Texts end where a stop string begins, at an end of text, or after so many tokens."""

from pathlib import Path

import pytest
import torch
from byte_tokenizer import write_byte_tokenizer

from torchlinearmoe import build_model
from torchlinearmoe.data.tokenizer import Tokenizer, load_tokenizer
from torchlinearmoe.generation import generate
from torchlinearmoe.harness import continuing
from torchlinearmoe.harness.continuing import continue_texts
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.recipe import resolve


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(write_byte_tokenizer(tmp_path))


@pytest.fixture(scope="module")
def model() -> Decoder:
    table = {"mixer": "gla", "layout": "LN", "num_layers": 2, "hidden_size": 32, "num_heads": 2, "init_std": 0.4}
    table |= {"num_kv_heads": 1, "vocab_size": 272}
    return build_model(resolve({"model": table, "moe": {"num_experts": 2}, "training": {"steps": 1}}).model, 3).eval()


PROMPTS = [[5, 6, 7], [9] * 20, [1, 2, 3, 4, 5, 6]]


def plain(model: Decoder, tokenizer: Tokenizer, prompt: list[int], count: int = 12) -> list[int]:
    chosen = [row[0] for row in generate(model, [prompt], count, vocab_size=tokenizer.vocab_size)]
    return [token for token in chosen if token is not None]


@pytest.mark.parametrize("most", [1, 64])
def test_texts_come_in_the_order_of_their_prompts(
    model: Decoder, tokenizer: Tokenizer, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuing, "MOST_SEQUENCES", most)
    told: list[int] = []
    found = continue_texts(model, tokenizer, PROMPTS, 12, done=told.append)
    end = tokenizer.end_of_text
    expected = [[token for token in plain(model, tokenizer, prompt) if token != end] for prompt in PROMPTS]
    assert found == [tokenizer.decode(ids) for ids in expected] and len(set(found)) == 3
    assert sum(told) == 3 and max(told) == min(most, 3)


def test_a_text_ends_before_the_first_stop_string(model: Decoder, tokenizer: Tokenizer) -> None:
    texts = continue_texts(model, tokenizer, [[i, i + 1] for i in range(0, 60, 3)], 12)
    # A stop string is text: a letter of one byte, not at the beginning.
    number, text = next((i, text) for i, text in enumerate(texts) if sum(c.isascii() for c in text[2:]) > 1)
    letters = [c for c in text[2:] if c.isascii()]
    stops = [letters[-1], letters[0], "not there at all"]
    (found,) = continue_texts(model, tokenizer, [[3 * number, 3 * number + 1]], 12, stops=stops)
    assert found == text[: min(text.index(stop) for stop in stops[:2])] and len(found) < len(text)


def test_a_sequence_that_has_stopped_takes_no_more_tokens(
    model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, *args: (steps.append(1), step(self, *args))[1])
    first = tokenizer.decode([plain(model, tokenizer, PROMPTS[0], 1)[0]])
    steps.clear()
    assert continue_texts(model, tokenizer, PROMPTS[:1], 12, stops=[first]) == [""] and not steps


def test_an_end_of_text_ends_it(model: Decoder, tokenizer: Tokenizer) -> None:
    ids = plain(model, tokenizer, PROMPTS[0])
    assert torch.tensor(ids).unique().numel() > 2
    (found,) = continue_texts(model, tokenizer, PROMPTS[:1], 12, ends={ids[3]})
    assert found == tokenizer.decode(ids[: ids.index(ids[3])])
