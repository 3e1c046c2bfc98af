"""Mixture of memories: what it is over every inner mixer, what stays apart, its router's balance and its refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from mixer_cases import Case, Dims, make_stack, random_inputs, relative
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torchlinearmoe.documents import Documents
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.mixers.base import Mixer
from torchlinearmoe.mixers.gla import GLA, Options
from torchlinearmoe.mixers.linear_mixer import LinearMixer
from torchlinearmoe.mixers.mom import MoM
from torchlinearmoe.moe.balance import counting_pass, sequence_balance_loss
from torchlinearmoe.moe.statistics import collect_statistics
from torchlinearmoe.moe.totals import StepTotals
from torchlinearmoe.recipe import resolve
from torchlinearmoe.recipe.parse import dump

MEMORIES = {name for name in MIXERS if issubclass(MIXERS[name], MoM)}
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


@pytest.mark.parametrize("inner", INNERS, ids=str)
def test_one_memory_alone_is_its_inner_mixer(inner: Case) -> None:
    """Outputs and gradients, the parameters being equal."""
    how = of_the_name if f"mom_{inner.name}" in MEMORIES else over
    case, dims = how(inner, num_memories=1, top_k=1, shared_memory=False)
    alone, memory = make_stack(inner, seed=1), make_stack(case, **dims)
    weights = dict(alone.named_parameters())
    pairs = {name: weights.get(_plain(name, case.name, inner.name)) for name, _ in memory.named_parameters()}
    assert [name for name, pair in pairs.items() if pair is None] == [f"mixers.{i}.router.weight" for i in (0, 1)]
    with torch.no_grad():
        for name, parameter in memory.named_parameters():
            pair = pairs[name]
            if pair is not None:
                parameter.copy_(pair.unsqueeze(1) if "write_layers" in name else pair)
    x_TD, direction = random_inputs(80), random_inputs(80, seed=3)
    found, expected = (stack.packed(x_TD, (1, 62, 17)) for stack in (memory, alone))
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


@pytest.mark.parametrize("inner", INNERS, ids=str)
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


@pytest.mark.parametrize("name", sorted(MEMORIES))
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


def test_all_memories_may_have_the_same_projections() -> None:
    """Which equals memories with layers of their own that happen to be equal."""
    own = make_stack(Case("mom_gla", {"conv": 3}))
    same = make_stack(Case("mom_gla", {"conv": 3, "shared_projections": True}))
    weights = dict(same.named_parameters())
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            source = weights[name.replace("write_layers", "inner")]
            parameter.copy_(source.unsqueeze(1).expand_as(parameter) if "write_layers" in name else source)
        x_TD = random_inputs(70)
        assert relative(same.packed(x_TD, (30, 40)), own.packed(x_TD, (30, 40))) < 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# the router's balance


def _layer(**overrides: Any) -> MoM:
    (mixer, _) = make_stack(Case("mom_gla", overrides)).layers
    assert isinstance(mixer, MoM)
    return mixer


def _context(layer: MoM, tokens: int, row_length: int, totals: StepTotals | None):
    documents = Documents.packed(list(range(0, tokens + 1, row_length)), row_length)
    stack = make_stack(Case("mom_gla", {}))
    return dataclasses.replace(stack.context(documents), totals=totals)


def _router_gradient(layer: MoM, x_TD: Tensor, context) -> Tensor:
    layer.zero_grad()
    layer(x_TD, context)[0].square().sum().backward()
    grad = layer.get_parameter("router.weight").grad
    assert grad is not None
    return grad.clone()


def test_the_balance_loss_is_added_in_training_and_only_there() -> None:
    layer, x_TD = _layer(balance_coefficient=0.7), random_inputs(24)
    plain = _router_gradient(layer, x_TD, _context(layer, 24, 8, None))
    totals = StepTotals(48, 6)  # half of a step
    trained = _router_gradient(layer, x_TD, _context(layer, 24, 8, totals))
    layer.zero_grad()
    routing = layer.router(x_TD)
    (0.7 * sequence_balance_loss(routing.topk_ids_Tk, routing.probs_TE, 8, 6)).backward()
    balance = layer.get_parameter("router.weight").grad
    assert balance is not None and float(balance.norm()) > 1e-3
    torch.testing.assert_close(trained - plain, balance, rtol=1e-9, atol=1e-12)
    layer.eval()
    torch.testing.assert_close(_router_gradient(layer, x_TD, _context(layer, 24, 8, totals)), plain)


def test_the_global_scope_counts_the_whole_step() -> None:
    """Two micro-batches under a counting pass add up to the gradient of both in one."""
    layer, x_TD, totals = _layer(balance_coefficient=0.7, balance_scope="global"), random_inputs(24), StepTotals(24, 3)
    whole = _router_gradient(layer, x_TD, _context(layer, 24, 8, totals))
    context, halves = _context(layer, 12, 4, totals), x_TD.split(12)
    whole_reads = _router_gradient(layer, x_TD, _context(layer, 24, 8, None))
    with counting_pass(layer):
        for half in halves:
            layer(half, context)
    assert collect_statistics(layer)["mom/balance_loss"] > 0  # of the forward before, none of the counting pass
    parts = [_router_gradient(layer, half, context) for half in halves]
    reads = [_router_gradient(layer, half, _context(layer, 12, 4, None)) for half in halves]
    torch.testing.assert_close(parts[0] + parts[1] - reads[0] - reads[1], whole - whole_reads, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_is_not_counted_again(use_reentrant: bool) -> None:
    layer, x_TD = _layer(), random_inputs(24).requires_grad_()
    context = _context(layer, 24, 8, StepTotals(24, 3))
    calls = []
    layer.router.register_forward_hook(lambda *_: calls.append(1))
    y_TD = checkpoint(lambda x: layer(x, context)[0], x_TD, use_reentrant=use_reentrant)
    assert isinstance(y_TD, Tensor)
    y_TD.sum().backward()
    assert len(calls) == 2
    assert layer.statistics.counts_E.sum() == 48 and layer.statistics.tokens == 24


def test_figures_are_those_of_the_memories_router() -> None:
    layer, x_TD, totals = _layer(num_memories=3), random_inputs(24), StepTotals(24, 3)
    layer(x_TD, _context(layer, 24, 8, totals))
    figures = collect_statistics(layer)
    routing = layer.router(x_TD)
    counts = torch.bincount(routing.topk_ids_Tk.flatten(), minlength=3).double()
    assert figures["mom/max_load"] == pytest.approx((counts.max() / counts.mean()).item())
    assert figures["mom/min_load"] == pytest.approx((counts.min() / counts.mean()).item())
    loss = 0.01 * sequence_balance_loss(routing.topk_ids_Tk, routing.probs_TE, 8, 3)
    assert figures["mom/balance_loss"] == pytest.approx(loss.item())
    assert not any(key.startswith("moe/") for key in figures)


def test_routing_is_float32_beside_bfloat16() -> None:
    layer = _layer()
    for module in layer.modules():
        if not getattr(module, "keep_fp32", False):
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(parameter.detach().bfloat16()))
    layer.router.float()
    routing = layer.router(random_inputs(9, dtype=torch.bfloat16))
    assert routing.topk_weights_Tk.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# recipes


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"num_memories": 0}, "mixer.mom_gla.num_memories = 0: must be at least 1"),
        ({"top_k": 5}, "mixer.mom_gla.top_k = 5: must lie between 1 and num_memories = 4"),
        ({"top_k": 0}, "mixer.mom_gla.top_k = 0: must lie between 1 and num_memories = 4"),
        ({"balance_coefficient": -1.0}, "mixer.mom_gla.balance_coefficient = -1.0: must not be negative"),
        ({"inner": "softmax_attention"}, "mixer.mom_gla.inner = 'softmax_attention': cannot be a memory; legal: "),
        ({"inner": "mom_gla"}, "mixer.mom_gla.inner = 'mom_gla': cannot be a memory; legal: "),
        ({"inner": "nothing"}, "mixer.mom_gla.inner = 'nothing': cannot be a memory; legal: "),
        ({"inner": "hgrn2", "expand_k": 1.0}, "mixer.mom_gla.expand_k: an option of gla, but inner = 'hgrn2'"),
        ({"gate_rank": 0}, "mixer.mom_gla.gate_rank = 0: must be at least 1"),
        ({"expand_v": 0.01}, "mixer.mom_gla.expand_v = 0.01: must make whole channels"),
    ],
)
def test_refuses_in_one_line(wrong: dict[str, Any], message: str) -> None:
    mixer = MIXERS["mom_gla"]
    with pytest.raises(RecipeError) as error:
        mixer.check(mixer.Options(**wrong), Dims())
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_an_inner_mixer_is_as_its_own_section_says_and_the_section_is_kept() -> None:
    tables: dict[str, Any] = {
        "model": {"mixer": "mom_gla"},
        "mixer": {"mom_gla": {"inner": "retention"}, "retention": {"expand_v": 1.0}},
        "training": {"steps": 1},
    }
    recipe = resolve(tables)
    text = dump(recipe)
    assert "[mixer.mom_gla]" in text and "[mixer.retention]" in text
    mixer, options = MIXERS["mom_gla"].inner_of(recipe.model.mixer_options["mom_gla"], recipe.model)  # pyright: ignore
    assert mixer is MIXERS["retention"] and options.expand_v == 1.0
    tables["mixer"]["retention"]["expand_v"] = 0.001
    with pytest.raises(RecipeError, match="mixer.retention.expand_v = 0.001"):
        resolve(tables)


def test_the_defaults_are_the_papers() -> None:
    for name in MEMORIES:
        options: Any = MIXERS[name].Options()
        assert (options.num_memories, options.top_k, options.shared_memory) == (4, 2, True)
        assert (options.balance_coefficient, options.balance_scope) == (0.01, "sequence")


def test_only_the_memories_that_a_token_has_count_as_active() -> None:
    mixer = make_stack(Case("mom_gla", {})).layers[0]
    assert isinstance(mixer, Mixer)
    written = GLA.write_parameters(Options(), Dims())
    assert sum(p.numel() for p in mixer.parameters()) - mixer.active_parameters() == 2 * written
    more = make_stack(Case("mom_gla", {"num_memories": 8})).layers[0]
    router = 4 * 64
    assert more.active_parameters() == mixer.active_parameters() + router
    assert more.flops_per_token(64) == mixer.flops_per_token(64) + 2 * router
