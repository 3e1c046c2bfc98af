"""Every mixer is causal, stops at document borders, and reads alike in one pass, in pieces and token by token."""

from __future__ import annotations

import torch
from mixer_cases import Case, Stack, check_pieces, every_mixer, make_stack, random_inputs, relative
from torch import Tensor

TOLERANCE = 1e-10


@every_mixer
def test_a_later_token_changes_no_earlier_output(case: Case):
    tokens, changed = 130, 67
    stack, x_TD = make_stack(case), random_inputs(130)
    other_TD = x_TD.clone()
    other_TD[changed] = random_inputs(1, seed=9)[0]
    with torch.no_grad():
        before, after = stack.packed(x_TD, [tokens]), stack.packed(other_TD, [tokens])
    assert relative(after[:changed], before[:changed]) < TOLERANCE
    assert all(relative(after[t], before[t]) > 1e-6 for t in (changed, changed + 1))


@every_mixer
def test_no_gradient_reaches_a_later_token_or_another_document(case: Case):
    lengths = [66, 31, 33]
    stack, x_TD = make_stack(case), random_inputs(sum(lengths)).requires_grad_()
    y_TD = stack.packed(x_TD, lengths)
    direction = random_inputs(1, seed=5)[0]
    for s in (0, 63, 64, 70, 97, 129):
        first = 0 if s < 66 else 66 if s < 97 else 97
        (grad,) = torch.autograd.grad((y_TD[s] * direction).sum(), x_TD, retain_graph=True)
        outside = torch.ones(sum(lengths), dtype=torch.bool)
        outside[first : s + 1] = False
        assert grad[outside].abs().max() < 1e-13
        assert grad[s].abs().max() > 1e-3
        if s > first:
            assert grad[s - 1].abs().max() > 1e-9, "the mixer does not mix"


@every_mixer
def test_packed_documents_equal_documents_alone_in_outputs_and_gradients(case: Case):
    stack = make_stack(case)
    for lengths in [(1, 63, 2, 64, 5), (1, 1, 3), (17, 47, 65)]:
        x_TD, weights = random_inputs(sum(lengths)), random_inputs(sum(lengths), seed=3)
        packed = _outputs_and_gradients(stack, [(x_TD, lengths)], [weights])
        alone = _outputs_and_gradients(
            stack, [(part, (part.shape[0],)) for part in x_TD.split(lengths)], list(weights.split(lengths))
        )
        assert relative(packed["output"], alone["output"]) < TOLERANCE, lengths
        for name in packed:
            scale = max(float(alone[name].norm()), 1e-6)
            assert float((packed[name] - alone[name]).norm()) < 1e-9 * scale, (lengths, name)


@every_mixer
def test_token_by_token_equals_one_pass(case: Case):
    batch, tokens = 2, 67
    stack = make_stack(case)
    x_BTD = random_inputs(batch * tokens).unflatten(0, (batch, tokens))
    with torch.no_grad():
        expected = stack.packed(x_BTD.flatten(0, 1), [tokens] * batch).unflatten(0, (batch, tokens))
        states = stack.empty(batch, tokens)
        for t in range(tokens):
            y_BD, states = stack.step(x_BTD[:, t], t, states)
            assert relative(y_BD, expected[:, t]) < TOLERANCE, t


@every_mixer
def test_reading_in_pieces_and_then_stepping_equals_one_pass(case: Case):
    stack = make_stack(case)
    for pieces in [(1, 66), (64, 3), (65, 2), (3, 4, 60), (67,)]:
        check_pieces(stack, pieces)


@every_mixer
def test_documents_of_unequal_lengths_each_go_on_from_their_own_state(case: Case):
    first, second = (5, 64, 1), (60, 1, 9)
    stack = make_stack(case)
    documents = [random_inputs(a + b, seed=n) for n, (a, b) in enumerate(zip(first, second))]
    with torch.no_grad():
        _, states = stack.resumed(
            torch.cat([x[:a] for x, a in zip(documents, first)]), first, (0, 0, 0), stack.empty(3, 70)
        )
        y_TD, _ = stack.resumed(torch.cat([x[a:] for x, a in zip(documents, first)]), second, first, states)
        expected = [stack.packed(x, [x.shape[0]])[a:] for x, a in zip(documents, first)]
    assert relative(y_TD, torch.cat(expected)) < TOLERANCE


def _outputs_and_gradients(
    stack: Stack, streams: list[tuple[Tensor, tuple[int, ...]]], weights: list[Tensor]
) -> dict[str, Tensor]:
    """Outputs of some streams side by side, and the gradients of one weighted sum by inputs and all parameters."""
    stack.zero_grad()
    inputs = [x.detach().clone().requires_grad_() for x, _ in streams]
    outputs = [stack.packed(x, lengths) for x, (_, lengths) in zip(inputs, streams)]
    torch.stack([(y * w).sum() for y, w in zip(outputs, weights)]).sum().backward()
    results = {"output": torch.cat(outputs).detach(), "inputs": torch.cat([_grad(x) for x in inputs])}
    for name, parameter in stack.named_parameters():
        results[name] = _grad(parameter).clone()
    return results


def _grad(x: Tensor) -> Tensor:
    assert x.grad is not None, "a parameter without a gradient"
    return x.grad
