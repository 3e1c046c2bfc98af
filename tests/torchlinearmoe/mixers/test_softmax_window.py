"""Softmax attention with a window: its definition, and decoding from a ring of the window's size.

These cases keep the mixer contract but for one line of it: their state does not grow, though they are attention.
"""

from __future__ import annotations

import inspect

import pytest
import test_mixer_contract as contract
import test_mixer_sequences as sequences
import torch
from mixer_cases import Case, make_stack, random_inputs, relative

from torchlinearmoe.documents import Documents
from torchlinearmoe.mixers.base import Carry

CASES = [
    Case("softmax_attention", {"window": 1}),
    Case("softmax_attention", {"window": 5, "heads": 4, "head_dim": 16, "kv_heads": 2}),
    Case("softmax_attention", {"window": 64}),
    Case("softmax_attention", {"window": 65, "heads": 3, "head_dim": 10, "kv_heads": 1}),
    Case("softmax_attention", {"window": 1000}),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
mixing_cases = pytest.mark.parametrize("case", CASES[1:], ids=str)
GROWING = "test_state_does_not_grow_unless_it_is_appended_to"


def _shared_checks():
    """The tests of the mixer contract that take a case and nothing else, but for the one on growth."""
    for module in (contract, sequences):
        for name, test in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("test_") and list(inspect.signature(test).parameters) == ["case"] and name != GROWING:
                yield pytest.param(test, id=name.removeprefix("test_"))


@mixing_cases
@pytest.mark.parametrize("check", list(_shared_checks()))
def test_the_mixer_contract_holds(check, case: Case):
    check(case)


@every_case
@pytest.mark.parametrize("pieces", [(1, 66), (64, 3), (3, 4, 60), (5, 5, 5), (67,), (6, 1, 1)], ids=str)
def test_reading_at_any_split_and_then_stepping_equals_one_pass(case: Case, pieces: tuple[int, ...]):
    sequences.test_reading_in_pieces_and_then_stepping_equals_one_pass(case, pieces)


@mixing_cases  # a window of 1 has no gradient by queries and keys to compare
@pytest.mark.parametrize("lengths", [(1, 63, 2, 64, 5), (17, 47, 65)], ids=str)
def test_packed_documents_equal_documents_alone(case: Case, lengths: tuple[int, ...]):
    sequences.test_packed_documents_equal_documents_alone_in_outputs_and_gradients(case, lengths)


@every_case
def test_the_ring_is_as_large_as_the_window(case: Case):
    stack = make_stack(case)
    window = case.options.window
    for mixer in stack.layers:
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
