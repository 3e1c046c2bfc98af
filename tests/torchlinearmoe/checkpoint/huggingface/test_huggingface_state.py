"""Generation that goes on from a state reads all that the state has not seen, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from own_cases import checkpoint, load
from torch import Tensor

from torchlinearmoe.checkpoint.huggingface.exporting import export_checkpoint

KINDS = ("linear", "hybrid", "latent hybrid")
NEW = 6


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    source, _ = checkpoint(tmp_path / "run", request.param)
    export_checkpoint(source, tmp_path / "exported")
    return load(tmp_path / "exported")


def continued(model: Any, tokens: Tensor, **options: Any) -> tuple[list[list[int]], Tensor]:
    """The new tokens of each sequence, and the logits they were taken from."""
    found = model.generate(
        tokens,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return found.sequences[:, -NEW:].tolist(), torch.stack(found.logits)


def assert_equal(found: tuple[list[list[int]], Tensor], expected: tuple[list[list[int]], Tensor]) -> None:
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("seen", [1, 16, 22, 23])
def test_a_state_of_the_beginning_is_as_good_as_none(model: Any, seen: int) -> None:
    tokens = torch.randint(1000, (2, 24))
    expected = continued(model, tokens)
    for use_cache in (True, False):
        state = model(tokens[:, :seen], use_cache=True).state
        assert_equal(continued(model, tokens, state=state, use_cache=use_cache), expected)


def test_sequences_may_have_come_unequally_far(model: Any) -> None:
    tokens = torch.randint(1000, (2, 24))
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    expected = continued(model, tokens, attention_mask=mask)
    state = model(tokens[:, :16], attention_mask=mask[:, :16], use_cache=True).state
    assert state.seen == (11, 16)
    assert_equal(continued(model, tokens, attention_mask=mask, state=state), expected)
    read = torch.ones_like(tokens[:, :16])
    read[0, 12:], read[1, 9:] = 0, 0
    state = model(tokens[:, :16], attention_mask=mask[:, :16] * read, use_cache=True).state
    assert state.seen == (7, 9)
    assert_equal(continued(model, tokens, attention_mask=mask, state=state), expected)


def test_the_end_of_a_text_is_enough_beside_a_mask_of_the_whole(model: Any) -> None:
    tokens = torch.randint(1000, (2, 24))
    expected = continued(model, tokens)
    for seen, start in ((16, 16), (16, 14), (4, 4)):
        state = model(tokens[:, :seen], use_cache=True).state
        found = continued(model, tokens[:, start:], attention_mask=torch.ones_like(tokens), state=state)
        assert_equal(found, expected)
    state = model(tokens[:, :16], use_cache=True).state
    with pytest.raises(ValueError, match="input_ids: holds 6 tokens of 8 that the state has not seen"):
        continued(model, tokens[:, 18:], attention_mask=torch.ones_like(tokens), state=state)


def test_a_text_that_does_not_go_on_beyond_its_state_is_refused(model: Any) -> None:
    tokens = torch.randint(1000, (2, 24))
    state = model(tokens, use_cache=True).state
    for length in (24, 20):
        with pytest.raises(ValueError, match=rf"has seen \[24, 24\] tokens of texts of \[{length}, {length}\]"):
            continued(model, tokens[:, :length], state=state)
    with pytest.raises(ValueError, match="state: of 2 sequences, but input_ids has 1"):
        continued(model, tokens[:1], state=state)
    with pytest.raises(ValueError, match="attention_mask: of 26 tokens, but input_ids has 30"):
        longer = torch.randint(1000, (2, 30))
        continued(model, longer, attention_mask=torch.ones(2, 26, dtype=torch.int64), state=state)


def test_padding_at_the_end_of_a_prompt_is_refused(model: Any) -> None:
    tokens = torch.randint(1000, (2, 10))
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    with pytest.raises(ValueError, match="pad on the left"):
        continued(model, tokens, attention_mask=mask)


@pytest.mark.parametrize("size", [(1100,), (900,), (1000, 128), (None, 100), (1025, 64)])
def test_a_vocabulary_of_another_size_is_refused_and_the_model_stays(model: Any, size: tuple[int, ...]) -> None:
    tokens = torch.randint(1000, (1, 12))
    logits, weights = model(tokens).logits, {name: value.clone() for name, value in model.state_dict().items()}
    if size == (1000, 128):
        assert model.resize_token_embeddings(*size) is model.get_input_embeddings()
    else:
        with pytest.raises(ValueError, match=r"a vocabulary of \d+: this model has 1024 ids"):
            model.resize_token_embeddings(*size)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == 1024
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(tokens).logits, logits)
