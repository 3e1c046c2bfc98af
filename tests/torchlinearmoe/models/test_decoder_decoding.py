"""Prefill and decoding read what the parallel forward reads, for every mixer and for hybrids with softmax layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_cases import LAYOUTS, VOCAB, every_layout, random_tokens, relative, small_model

from torchlinearmoe.models.decoder import Decoder, DecodeState

TOLERANCE = 1e-10
PURE = {"mixer": "hgrn2", "layout": "L", "num_layers": 2}
HYBRID = {"mixer": "gated_delta_net", "layout": "LLLN", "num_layers": 4}


@every_layout
def test_steps_equal_the_parallel_forward(layout: dict[str, Any]):
    model, tokens = small_model(layout), random_tokens(2, 20)
    with torch.no_grad():
        expected = model(tokens)
        state = model.init_state(2, max_length=20)
        for t in range(20):
            logits, state = model.step(tokens[:, t], state)
            assert logits.shape == (2, VOCAB)
            assert relative(logits, expected[:, t]) < TOLERANCE, t
    assert state.seen == (20, 20) and state.positions.tolist() == [20, 20]


@every_layout
def test_prompts_of_unequal_lengths_then_steps_equal_the_parallel_forward(layout: dict[str, Any]):
    lengths, more = [70, 0, 1, 33], 4
    model, tokens = small_model(layout), random_tokens(4, 70 + more)
    with torch.no_grad():
        expected = model(tokens)
        padded = tokens[:, :70].clone()
        for n, length in enumerate(lengths):
            padded[n, length:] = 3
        logits, state = model.prefill(padded, model.init_state(4, max_length=80), lengths)
        for n, length in enumerate(lengths):
            assert not logits[n, length:].any()
            if length:
                assert relative(logits[n, :length], expected[n, :length]) < TOLERANCE
        assert state.seen == tuple(lengths)
        for i in range(more):
            following = torch.stack([tokens[n, length + i] for n, length in enumerate(lengths)])
            logits, state = model.step(following, state)
            wanted = torch.stack([expected[n, length + i] for n, length in enumerate(lengths)])
            assert relative(logits, wanted) < TOLERANCE, i


@pytest.mark.parametrize("layout", [PURE, HYBRID], ids=["pure", "hybrid"])
def test_prompts_may_come_in_turns_some_sequences_waiting(layout: dict[str, Any]):
    model, tokens = small_model(layout), random_tokens(2, 12)
    with torch.no_grad():
        expected = model(tokens)
        state = model.init_state(2, max_length=12)
        turns = [(0, 5), (7, 0), (1, 3), (0, 0), (4, 4)]
        seen = [0, 0]
        for turn in turns:
            padded = torch.zeros(2, 8, dtype=torch.int64)
            for n, count in enumerate(turn):
                padded[n, :count] = tokens[n, seen[n] : seen[n] + count]
            logits, state = model.prefill(padded, state, torch.tensor(turn))
            for n, count in enumerate(turn):
                if count:
                    assert relative(logits[n, :count], expected[n, seen[n] : seen[n] + count]) < TOLERANCE
                seen[n] += count
    assert state.seen == (12, 12)


def test_a_whole_batch_needs_no_lengths():
    model, tokens = small_model(HYBRID), random_tokens(2, 9)
    with torch.no_grad():
        logits, state = model.prefill(tokens, model.init_state(2))
        assert relative(logits, model(tokens)) < TOLERANCE
    assert state.seen == (9, 9) and state.max_length == model.recipe.max_length


def test_only_softmax_layers_make_the_state_grow_with_its_room():
    def size(model: Decoder, room: int) -> int:
        return sum(value.numel() for layer in model.init_state(1, room).layers for value in layer.values())

    assert size(small_model(PURE), 10) == size(small_model(PURE), 10_000)
    hybrid = small_model(HYBRID)
    assert size(hybrid, 20) - size(hybrid, 10) == 10 * 2 * 16  # keys and values of one layer, one head of 16


def test_a_sequence_may_fill_its_room_but_not_outgrow_it():
    model, tokens = small_model(HYBRID), random_tokens(2, 8)
    with torch.no_grad():
        _, full = model.prefill(tokens, model.init_state(2, max_length=8))
        with pytest.raises(ValueError, match="^max_length = 8: a sequence of 9 tokens has no room"):
            model.step(tokens[:, 0], full)
        with pytest.raises(ValueError, match="^max_length = 7: a sequence of 8 tokens"):
            model.prefill(tokens, model.init_state(2, max_length=7))
        pure = small_model(PURE)
        _, state = pure.prefill(tokens, pure.init_state(2, max_length=2))
        pure.step(tokens[:, 0], state)


@pytest.mark.parametrize("lengths", [[3], [1, 2, 3], [-1, 2], [9, 1]], ids=str)
def test_lengths_that_do_not_fit_are_refused(lengths: list[int]):
    model = small_model(PURE)
    with pytest.raises(ValueError, match="^lengths = "):
        model.prefill(random_tokens(2, 8), model.init_state(2), lengths)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.get("layout") == "L"], ids=str)
def test_a_step_of_linear_layers_leaves_the_old_state_alone(layout: dict[str, Any]):
    model = small_model(layout)
    with torch.no_grad():
        _, state = model.prefill(random_tokens(1, 5), model.init_state(1, max_length=9))
        copy = _copy(state)
        for tokens in random_tokens(2, 1, seed=4):
            logits, _ = model.step(tokens, state)
            again, _ = model.step(tokens, copy)
            assert torch.equal(logits, again)
            copy = _copy(copy)


def _copy(state: DecodeState) -> DecodeState:
    layers = [{name: value.clone() for name, value in layer.items()} for layer in state.layers]
    return DecodeState(layers, state.positions, state.seen, state.max_length)
