"""Every mixer over spans of its rows on several ranks computes what one process does, with every gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPool
from mixer_cases import CASES, Case, make_stack, random_inputs
from torch import Tensor, nn

from torchlinearmoe.documents import Documents
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.mixers.mom import MoM
from torchlinearmoe.moe.router import Router
from torchlinearmoe.spans import Exchange, cut_spans

Once = Callable[..., list[Any]]

ROWS = {
    # Cut at 70 (two ranks) or at 35, 70, 105 (four). First row: a document with one token on its second rank, one
    # inside a rank, one with one token on its first rank that ends at a border of ranks, a single token, and the rest.
    # Second row: a document that passes through two whole ranks, then single tokens.
    "long": (140, [0, 36, 69, 105, 106, 140, 150, 278, 279, 280]),
    # Spans of two tokens, shorter than a convolution reaches.
    "short": (8, [0, 7, 8]),
    # Six tokens a rank of four.
    "six": (24, [0, 24]),
}


def compare(
    rank: int, cases: Sequence[Case], layout: str, attention: str = "auto", lone: int | None = None
) -> dict[str, float]:
    """The largest relative error of outputs and of all gradients, by case and name.

    lone: the one token that the last memory of the first layer is given.
    """
    errors: dict[str, float] = {}
    for number, case in enumerate(cases):
        row_length, borders = ROWS[layout]
        x_TD, weights_TD = random_inputs(borders[-1]), random_inputs(borders[-1], seed=3)
        stack = make_stack(case)
        if lone is not None:
            give_one_token(stack.layers[0].get_submodule("router"), x_TD, lone)
        found = spanned_run(stack, x_TD, weights_TD, borders, row_length, attention)
        if rank == number % dist.get_world_size():
            expected = run(stack, Documents.packed(borders, row_length), x_TD, weights_TD)
            for name, value in expected.items():
                scale = max(float(value.norm()), 1e-6)
                errors[f"{case} {name}"] = float((found[name] - value).norm()) / scale
    return errors


@torch.no_grad()
def give_one_token(router: nn.Module, x_TD: Tensor, token: int) -> None:
    """Let a router send this token, and no other, to its last memory."""
    logits_T = torch.full((len(x_TD), 1), -30.0, dtype=x_TD.dtype)
    logits_T[token] = 30.0
    assert isinstance(router, Router)
    router.weight[-1] = torch.linalg.lstsq(x_TD, logits_T).solution[:, 0]
    given = (router(x_TD).topk_ids_Tk == router.num_experts - 1).any(-1)
    assert given.nonzero().tolist() == [[token]]


def run(stack, documents: Documents, x_TD: Tensor, weights_TD: Tensor, positions: Tensor | None = None):
    """Outputs and the gradients of a weighted sum of them."""
    stack.zero_grad()
    x_TD = x_TD.clone().requires_grad_()
    y_TD = stack(x_TD, stack.context(documents, positions))[0]
    (y_TD * weights_TD).sum().backward()
    assert x_TD.grad is not None
    results = {"output": y_TD.detach(), "inputs": x_TD.grad}
    return results | {name: p.grad.clone() for name, p in stack.named_parameters() if p.grad is not None}


def spanned_run(
    stack, x_TD: Tensor, weights_TD: Tensor, borders: Sequence[int], row_length: int, attention: str
) -> dict[str, Tensor]:
    """The same, made by all ranks; gradients of parameters are summed, outputs joined."""
    group = dist.group.WORLD
    assert group is not None
    spans = cut_spans(borders, row_length, group, exchange=Exchange(attention=attention))
    own_x, own_weights = (
        x.view(-1, spans.size, spans.length, 64)[:, spans.rank].flatten(0, 1) for x in (x_TD, weights_TD)
    )
    documents = Documents.packed(spans.borders, spans.length, spans=spans)
    results = run(stack, documents, own_x, own_weights, spans.positions)
    for name, value in results.items():
        if name in ("output", "inputs"):
            parts = [torch.empty_like(value) for _ in range(spans.size)]
            dist.all_gather(parts, value)
            rows = [part.view(spans.rows, spans.length, 64) for part in parts]
            results[name] = torch.cat(rows, 1).flatten(0, 1)
        else:
            dist.all_reduce(value)
    return results


CONVOLVED = [Case(name, {"conv": 4}) for name in MIXERS if hasattr(MIXERS[name].Options(), "conv")]
MEMORIES = [case for case in CONVOLVED if issubclass(case.mixer, MoM)]
FARTHEST = {name: Case(name, {}) for name in MIXERS.names()} | {case.name: case for case in CONVOLVED}
"""One case of each mixer, the one whose tokens reach farthest back."""


@pytest.mark.parametrize(
    "world_size, layout, cases",
    [
        pytest.param(2, "long", CASES, id="2-long"),
        pytest.param(4, "short", list(FARTHEST.values()), id="4-short"),
        pytest.param(4, "short", CASES, id="4-short, all", marks=pytest.mark.distributed_full),
        pytest.param(4, "long", CASES, id="4-long", marks=pytest.mark.distributed_full),
    ],
)
@pytest.mark.parametrize("mixer", MIXERS.names())
def test_spans_of_rows_on_several_ranks_equal_whole_rows(
    once: Once, selected: list[str], mixer: str, world_size: int, layout: str, cases: list[Case]
) -> None:
    found = once(world_size, compare, [case for case in cases if case.name in selected], layout, timeout=300)
    assert_equal(found, [case for case in cases if case.name == mixer])


@pytest.mark.parametrize("mixer", [case.name for case in CONVOLVED])
def test_convolutions_reach_over_spans_of_six_tokens(once: Once, selected: list[str], mixer: str) -> None:
    found = once(4, compare, [case for case in CONVOLVED if case.name in selected], "six")
    assert_equal(found, [case for case in CONVOLVED if case.name == mixer])


@pytest.mark.parametrize("token", [0, 10, 23])
def test_a_memory_may_be_given_a_single_token_of_all_ranks(ranks: RankPool, token: int) -> None:
    assert len(MEMORIES) >= 2
    assert_equal(ranks(4, compare, MEMORIES, "six", "auto", token), MEMORIES)


SOFTMAX = [
    Case("softmax_attention", {"heads": 8, "head_dim": 8, "kv_heads": 4, **more})
    for more in ({}, {"window": 9}, {"window": 80, "conv": 3})
]


@pytest.mark.parametrize("attention", ["gather", "heads"])
def test_softmax_attention_sees_other_spans_either_way(ranks: RankPool, attention: str) -> None:
    assert_equal(ranks(4, compare, SOFTMAX, "long", attention), SOFTMAX)


def assert_equal(parts: Sequence[dict[str, float]], cases: Sequence[Case]) -> None:
    """Every one of these cases was compared, and agreed."""
    names = {str(case) for case in cases}
    errors = {name: error for part in parts for name, error in part.items() if name.split(" ")[0] in names}
    assert {name.split(" ")[0] for name in errors} == names
    wrong = {name: error for name, error in errors.items() if not error < 1e-9}
    assert not wrong
