"""Softmax attention: without a bias; with a window, whose past is a ring of its size instead of a growing cache."""

from __future__ import annotations

import pytest
import torch
from mixer_cases import Case, check_pieces, make_stack, random_inputs, relative

from torchlinearmoe.documents import Documents
from torchlinearmoe.mixers.base import Carry

WINDOWS = [1, 5, 64, 65, 1000]
"""With a window of 1 a token sees itself alone, and no gradient reaches queries and keys."""


@pytest.mark.parametrize("window", WINDOWS)
def test_reading_at_any_split_and_then_stepping_equals_one_pass(window: int):
    stack = make_stack(Case("softmax_attention", {"window": window}))
    for pieces in [(1, 66), (64, 3), (3, 4, 60), (5, 5, 5), (67,), (6, 1, 1)]:
        check_pieces(stack, pieces)


def test_biases_are_on_queries_keys_and_values():
    names = {name for name, _ in make_stack(Case("softmax_attention", {"qkv_bias": True})).layers[0].named_parameters()}
    plain = {name for name, _ in make_stack(Case("softmax_attention", {})).layers[0].named_parameters()}
    assert names - plain == {"q_proj.bias", "k_proj.bias", "v_proj.bias"}


@pytest.mark.parametrize("window", WINDOWS)
def test_the_ring_is_as_large_as_the_window(window: int):
    for mixer in make_stack(Case("softmax_attention", {"window": window})).layers:
        for part in mixer.state_spec().values():
            assert part.carry is Carry.LAST_TOKENS and part.shape[0] == window
        for room in (3, 10_000):
            state = mixer.init_state(2, room, torch.device("cpu"), torch.float64)
            assert all(value.shape[1] == window for value in state.values())


@pytest.mark.parametrize("window", [1, 5, 64])
def test_a_token_outside_the_window_has_no_say(window: int):
    """In one layer; every further layer reaches another window back."""
    stack, x_TD = make_stack(Case("softmax_attention", {"window": window})), random_inputs(130)
    other_TD = x_TD.clone()
    other_TD[20] = random_inputs(1, seed=9)[0]
    mixer, context = stack.layers[0], stack.context(Documents.batch(1, 130))
    with torch.no_grad():
        same = (mixer(x_TD, context)[0] - mixer(other_TD, context)[0]).abs().amax(1) < 1e-12
    assert same.tolist() == [not 20 <= t < 20 + window for t in range(130)]


def test_a_window_of_the_whole_document_is_no_window():
    x_TD = random_inputs(70)
    full, wide = (make_stack(Case("softmax_attention", options)) for options in ({}, {"window": 70}))
    wide.load_state_dict(full.state_dict())
    with torch.no_grad():
        assert torch.equal(full.packed(x_TD, [70]), wide.packed(x_TD, [70]))
        narrow = make_stack(Case("softmax_attention", {"window": 69}))
        narrow.load_state_dict(full.state_dict())
        difference = (full.packed(x_TD, [70]) - narrow.packed(x_TD, [70])).abs().amax(1)
    assert difference[:69].max() < 1e-12 < difference[69]


def test_without_a_window_the_past_is_appended_to():
    (spec, *_) = (mixer.state_spec() for mixer in make_stack(Case("softmax_attention", {})).layers)
    assert {part.carry for part in spec.values()} == {Carry.APPEND}


@pytest.mark.parametrize("stepping", [True, False])
def test_a_wrapped_ring_survives_sequences_of_unequal_lengths(stepping: bool):
    """Prompts around the window's size, decoded further than it, each like its own full pass."""
    window, starts, steps = 5, (1, 4, 5, 6, 13), 12
    stack = make_stack(Case("softmax_attention", {"window": window}))
    texts = [random_inputs(start + steps, seed=n) for n, start in enumerate(starts)]
    with torch.no_grad():
        expected = [stack.packed(text, [text.shape[0]]) for text in texts]
        first = torch.cat([text[:start] for text, start in zip(texts, starts)])
        y_TD, states = stack.resumed(first, starts, [0] * len(starts), stack.empty(len(starts), 3))
        assert relative(y_TD, torch.cat([y[:start] for y, start in zip(expected, starts)])) < 1e-10
        for index in range(steps):
            seen = [start + index for start in starts]
            token = torch.stack([text[at] for text, at in zip(texts, seen)])
            # One token each, of sequences at different positions.
            documents = Documents.batch(len(starts), 1)
            context = stack.context(documents, torch.tensor(seen), stepping=stepping, history=max(seen) + 1)
            y_BD, states = stack(token, context, states)
            assert relative(y_BD, torch.stack([y[at] for y, at in zip(expected, seen)])) < 1e-10


@pytest.mark.parametrize(("window", "length"), [(1, 9), (4, 9), (9, 9), (20, 9), (0, 9)])
def test_flops_count_the_tokens_seen(window: int, length: int):
    mixer = make_stack(Case("softmax_attention", {"window": window})).layers[0]
    seen = sum(min(t + 1, window or length) for t in range(length)) / length
    assert mixer.mixing_flops(length) == pytest.approx(4 * 2 * 32 * seen)
