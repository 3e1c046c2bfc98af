"""Mixture of memories: what it is over every inner mixer, what stays apart, memories that are given little."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from definition_check import check_stack, definition_of
from mixer_cases import Case, make_stack, random_inputs, relative, small_model
from parameter_formulas import LAYER

from torchlinearmoe.documents import Documents
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.mixers.linear_mixer import LinearMixer
from torchlinearmoe.mixers.mom import MoM

MEMORIES = {name for name in MIXERS if issubclass(MIXERS[name], MoM)}
every_memory = pytest.mark.parametrize("name", sorted(MEMORIES))
INNERS = [Case(name, {}) for name in MIXERS if issubclass(MIXERS[name], LinearMixer)]
INNERS += [Case(case.name, MIXERS[case.name].variants[0]) for case in INNERS]


def over(inner: Case, **overrides: Any) -> tuple[Case, dict[str, Any]]:
    """Memories of `inner`, and the model that says so."""
    return Case("mom_gated_delta_net", {"inner": inner.name, **overrides}), {
        "mixer_options": {inner.name: inner.options}
    }


def of_the_name(inner: Case, **overrides: Any) -> tuple[Case, dict[str, Any]]:
    """Memories of the mixer that the name has, its options in the same section."""
    return Case(f"mom_{inner.name}", {**inner.overrides, **overrides}), {}


def alone(inner: Case) -> tuple[Case, dict[str, Any]]:
    """One memory and nothing beside it."""
    how = of_the_name if f"mom_{inner.name}" in MEMORIES else over
    return how(inner, num_memories=1, top_k=1, shared_memory=False)


@pytest.mark.parametrize("inner", INNERS, ids=lambda inner: f"{alone(inner)[0].name}-of-{inner}")
def test_one_memory_alone_is_its_inner_mixer(inner: Case) -> None:
    """Outputs and gradients, the parameters being equal."""
    case, dims = alone(inner)
    plain, memory = make_stack(inner, seed=1), make_stack(case, **dims)
    weights = dict(plain.named_parameters())
    pairs = {name: weights.get(_plain(name, case.name, inner.name)) for name, _ in memory.named_parameters()}
    assert [name for name, pair in pairs.items() if pair is None] == [f"mixers.{i}.router.weight" for i in (0, 1)]
    with torch.no_grad():
        for name, parameter in memory.named_parameters():
            pair = pairs[name]
            if pair is not None:
                parameter.copy_(pair.unsqueeze(1) if "write_layers" in name else pair)
    x_TD, direction = random_inputs(80), random_inputs(80, seed=3)
    found, expected = (stack.packed(x_TD, (1, 62, 17)) for stack in (memory, plain))
    assert relative(found.detach(), expected.detach()) < 1e-12
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    for name, parameter in memory.named_parameters():
        pair = pairs[name]
        assert parameter.grad is not None, name
        if pair is not None:
            assert pair.grad is not None, name
            grad = parameter.grad.squeeze(1) if "write_layers" in name else parameter.grad
            assert float((grad - pair.grad).norm()) <= 1e-10 * max(float(pair.grad.norm()), 1e-6), name


def _plain(name: str, memory: str, inner: str) -> str:
    """The inner mixer's own name of a parameter."""
    name = name.replace(f"shared.{memory}", f"shared.{inner}").replace("query_convs.", "convs.")
    return name.replace("inner.", "").replace("write_layers.", "")


@pytest.mark.parametrize("inner", INNERS, ids=lambda inner: f"{over(inner)[0].name}-of-{inner}")
def test_the_formula_counts_memories_of_every_inner_mixer(inner: Case) -> None:
    case, dims = over(inner)
    (_, layer) = make_stack(case, **dims).layers
    counted = sum(parameter.numel() for parameter in layer.parameters())
    assert LAYER[case.name](case.options, small_model(**dims)) == counted


@pytest.mark.parametrize("inner", INNERS, ids=lambda inner: f"{over(inner)[0].name}-of-{inner}")
def test_every_inner_mixer_reads_alike_in_one_pass_in_pieces_and_in_steps(inner: Case) -> None:
    case, dims = over(inner, num_memories=3)
    stack, x_TD = make_stack(case, **dims), random_inputs(60)
    with torch.no_grad():
        expected = stack.packed(x_TD, (30, 30))
        states, outputs = stack.empty(2, 30), []
        for first, last in ((0, 9), (9, 27)):
            pieces = torch.cat([x_TD[first:last], x_TD[30 + first : 30 + last]])
            y_TD, states = stack.resumed(pieces, [last - first] * 2, [first] * 2, states)
            outputs.append(y_TD.unflatten(0, (2, -1)))
        for t in range(27, 30):
            y_BD, states = stack.step(torch.stack([x_TD[t], x_TD[30 + t]]), t, states)
            outputs.append(y_BD.unsqueeze(1))
    assert relative(torch.cat(outputs, 1).flatten(0, 1), expected) < 1e-10


@every_memory
def test_a_token_changes_only_its_memories(name: str) -> None:
    case = Case(name, {"num_memories": 5, "conv": 3})
    mixer = make_stack(case).layers[0]
    stack = make_stack(case)
    x_BD = random_inputs(4)
    before = {key: torch.randn_like(value) for key, value in stack.empty(4, 1)[0].items()}
    documents = Documents.batch(4, 1)
    with torch.no_grad():
        _, after, _ = mixer(x_BD, stack.context(documents, stepping=True, history=1), before)
        chosen = mixer.router(x_BD).topk_ids_Tk  # pyright: ignore
    assert after is not None and set(after) == set(before) == {"recurrent", "conv_q", "conv_k", "conv_v"}
    for b in range(4):
        for m in range(6):
            same = all(torch.equal(after[key][b, m], before[key][b, m]) for key in before.keys() - {"conv_q"})
            assert same == (m < 5 and m not in chosen[b])


@every_memory
def test_a_memory_of_one_token_in_the_whole_stream_is_right(name: str) -> None:
    case = Case(name, {"top_k": 1, "shared_memory": False, "renormalize": False, "conv": 3})
    stack, x_TD = make_stack(case), random_inputs(20)
    mixer, lengths = stack.layers[0], (6, 14)
    x_TD[:, 0] = -10.0
    x_TD[11, 0] = 10.0
    with torch.no_grad():
        mixer.get_parameter("router.weight")[2] = 0.0
        mixer.get_parameter("router.weight")[2, 0] = 1.0
        chosen = mixer.router(x_TD).topk_ids_Tk  # pyright: ignore
    assert (chosen == 2).sum() == 1 and chosen[11] == 2
    check_stack(case, stack, definition_of(name), x_TD, lengths)
    (row,) = torch.autograd.grad(mixer(x_TD, stack.context(Documents.packed([0, 6, 20])))[0].sum(), x_TD)
    assert float(row[11].norm()) > 1e-3


@every_memory
def test_the_defaults_are_the_papers(name: str) -> None:
    options: Any = MIXERS[name].Options()
    assert (options.num_memories, options.top_k, options.shared_memory) == (4, 2, True)
    assert (options.balance_coefficient, options.balance_scope) == (0.01, "sequence")
