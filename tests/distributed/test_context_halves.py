"""What spans exchange between the two halves of a recurrence, on several ranks in float64, by halves of plain PyTorch.

The halves here are any recurrence with states, and autograd for its way back; those of our kernels are tested in
`tests/torchlinearmoe/mixers/test_spans_in_halves.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from harness import RankPool
from mixer_cases import CASES, Case
from test_context_mixers import assert_equal, compare
from torch import Tensor

from torchlinearmoe.kernels import delta, dplr, linear, slots
from torchlinearmoe.kernels.chunk_table import ChunkTable
from torchlinearmoe.kernels.halves import Done, Halves, Passed, Steps
from torchlinearmoe.kernels.operator import Operator
from torchlinearmoe.segments import Segments

Inputs = Sequence[Tensor | None]
Run = Callable[..., tuple[Tensor, list[Tensor]]]
"""Of segments, inputs and the states of all documents: the output, and the states that leave."""


def run_linear(segments: Segments, inputs: Inputs, initial: list[Tensor], *, scale: float) -> Any:
    q, k, v, g, bonus = inputs
    assert q is not None and k is not None and v is not None
    o, final = linear.linear_recurrence(
        q, k, v, g, bonus=bonus, scale=scale, segments=segments, initial_state=initial[0], want_final=True
    )
    return o, [final]


def run_delta(segments: Segments, inputs: Inputs, initial: list[Tensor], **options: Any) -> Any:
    o, final = delta.delta_rule(*inputs, segments=segments, initial_state=initial[0], want_final=True, **options)  # pyright: ignore[reportArgumentType]
    return o, [final]


def run_dplr(segments: Segments, inputs: Inputs, initial: list[Tensor], **options: Any) -> Any:
    o, final = dplr.dplr_rule(*inputs, segments=segments, initial_state=initial[0], want_final=True, **options)  # pyright: ignore[reportArgumentType]
    return o, [final]


def run_slots(segments: Segments, inputs: Inputs, initial: list[Tensor], **options: Any) -> Any:
    """Slot keys lie as [H, S, K], like all that decays by rows."""
    states = initial[0].transpose(2, 3), initial[1]
    o, final = slots.slot_attention(*inputs, segments=segments, initial_state=states, want_final=True, **options)  # pyright: ignore[reportArgumentType]
    assert final is not None
    return o, [final[0].transpose(2, 3), final[1]]


def linear_shapes(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> list[tuple[int, ...]]:
    return [(v.shape[1], k.shape[2], v.shape[2])]


def slot_shapes(q: Tensor, k: Tensor, v: Tensor, s: Tensor, *_: Any) -> list[tuple[int, ...]]:
    return [(s.shape[1], s.shape[2], x.shape[2]) for x in (k, v)]


@dataclasses.dataclass(frozen=True)
class Plain:
    """Halves of `run`; the values are inputs[2]."""

    run: Run
    shapes: Callable[..., list[tuple[int, ...]]]
    dense: bool = False

    def forward(self, table: ChunkTable, *inputs: Tensor | None, through: bool, **options: Any) -> Steps:
        segments = segments_of(table, inputs)
        empty = self.states(segments, inputs)
        _, finals = self.run(segments, inputs, empty, **options)
        yield Passed([x[-1] for x in finals], self.factor(segments, inputs, **options) if through else None)
        entering = yield None
        assert entering is not None
        o, _ = self.run(segments, inputs, self.states(segments, inputs, entering), **options)
        return Done((o,), tuple(entering))

    def backward(self, table: ChunkTable, inputs: Inputs, kept: Sequence[Tensor], do: Tensor, **options: Any) -> Steps:
        segments = segments_of(table, inputs)
        with torch.enable_grad():
            leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
            entering = [x.detach().requires_grad_() for x in kept]
            o, finals = self.run(segments, leaves, self.states(segments, leaves, entering), **options)
            last = [x[-1] for x in finals]
        yield Passed(list(torch.autograd.grad(o, entering, do, retain_graph=True)))
        leaving = yield None
        assert leaving is not None
        given = [x for x in leaves if x is not None]
        found = iter(torch.autograd.grad([o, *last], given, [do, *leaving]))
        return Done(tuple(None if x is None else next(found) for x in leaves))

    def states(self, segments: Segments, inputs: Inputs, entering: Sequence[Tensor] = ()) -> list[Tensor]:
        """Of all documents, the first one's given."""
        zeros = [do_zeros(inputs, segments.count, shape) for shape in self.shapes(*inputs)]
        first = torch.arange(segments.count) == 0
        return [torch.where(first.view(-1, 1, 1, 1), x, z) for x, z in zip(entering, zeros)] if entering else zeros

    def factor(self, segments: Segments, inputs: Inputs, **options: Any) -> Tensor:
        """What is left of a state: of the identity, or of ones, where nothing is written."""
        narrow, (heads, K, _) = list(inputs), self.shapes(*inputs)[-1]
        v = inputs[2]
        assert v is not None
        narrow[2] = v.new_zeros(*v.shape[:2], K if self.dense else 1)
        ones = torch.eye(K, dtype=v.dtype) if self.dense else v.new_ones(K, 1)
        states = self.states(segments, narrow)
        states[-1] = ones.expand(segments.count, heads, *ones.shape)
        left = self.run(segments, narrow, states, **options)[1][-1][-1]
        return left if self.dense else left.squeeze(-1)


def do_zeros(inputs: Inputs, count: int, shape: tuple[int, ...]) -> Tensor:
    assert inputs[0] is not None
    return inputs[0].new_zeros(count, *shape)


def segments_of(table: ChunkTable, inputs: Inputs) -> Segments:
    """Closed again."""
    assert inputs[0] is not None
    ids = torch.zeros(len(inputs[0]), dtype=torch.int32)
    for start, end, segment in zip(table.start_M, table.end_M, table.segment_M):
        ids[start:end] = segment
    return Segments.of_lengths(tuple(ids.bincount().tolist()))


HALVES: dict[Operator, tuple[Plain, dict[str, Any]]] = {
    linear.OPERATOR: (Plain(run_linear, linear_shapes), {"apart": 1}),
    delta.OPERATOR: (Plain(run_delta, linear_shapes, dense=True), {"dense": True}),
    dplr.OPERATOR: (Plain(run_dplr, linear_shapes, dense=True), {"dense": True}),
    slots.OPERATOR: (Plain(run_slots, slot_shapes), {}),
}
NAMES = ("linear_attention", "retention", "mamba2", "hgrn2", "rwkv6", "gsa", "gated_delta_net", "kda", "rwkv7")
GROUPED = [Case(name, {"heads": 4, "head_dim": 16, "kv_heads": 2}) for name in ("gla", "gsa")]
"""Heads that share a state, of which one travels."""


def compare_in_halves(rank: int, cases: Sequence[Case], layout: str) -> dict[str, float]:
    """As `compare`, by these halves."""
    with pytest.MonkeyPatch.context() as patch:
        taken = 0

        def counted(plain: Plain) -> Callable[..., Steps]:
            def forward(*inputs: Any, **options: Any) -> Steps:
                nonlocal taken
                taken += 1
                return plain.forward(*inputs, **options)

            return forward

        for operator, (plain, more) in HALVES.items():
            backends = operator.find_backends()
            halves = Halves(counted(plain), plain.backward, **more)
            patch.setitem(backends, "torch", dataclasses.replace(backends["torch"], halves=halves))
        errors = compare(rank, cases, layout)
        assert taken >= len(cases)
    return errors


@pytest.mark.parametrize(
    "world_size, cases",
    [
        pytest.param(2, [*(Case(name, {}) for name in ("rwkv6", "gsa", "rwkv7")), *GROUPED], id="2"),
        pytest.param(4, [Case(name, {}) for name in ("hgrn2", "gated_delta_net")], id="4"),
        pytest.param(2, [case for case in CASES if case.name in NAMES], id="2, all", marks=pytest.mark.slow),
        pytest.param(4, [case for case in CASES if case.name in NAMES], id="4, all", marks=pytest.mark.slow),
    ],
)
def test_halves_on_several_ranks_equal_whole_rows(ranks: RankPool, world_size: int, cases: list[Case]) -> None:
    assert_equal(ranks(world_size, compare_in_halves, cases, "long", timeout=300), cases)
