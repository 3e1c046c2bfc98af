"""A recurrence over a span of tokens in two halves, between which states pass from rank to rank.

The span's first document goes on from a state that is not known yet, and its last one goes on after it. The first half
says what the span makes of any state, S_out = A S_in + B; the second begins when S_in is there. A direction is a
generator:

    steps = halves.forward(table, *inputs, through=True, scale=...)
    next(steps)                 Passed(B, A)           what ranks exchange
    next(steps)                 what needs no state    runs while it travels
    steps.send(S_in)            Done(o, kept)          by `finished`

and so is the way back, which says the gradient of S_in as if nothing came from behind, and goes on with the gradient of
S_out. Nothing is computed for it that one rank alone would not compute: B is what the walk over chunks sums anyway.

Where the inputs and what is kept lie, autograd decides: these are no operators of the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinearmoe.kernels.chunk_table import ChunkTable, table_of
from torchlinearmoe.segments import Segments

States = list[Tensor]
"""[H, K, V] in fp32 each; most recurrences have one."""


@dataclass(frozen=True)
class Passed:
    """What a span makes of what comes in: A S + B."""

    written: States
    """B; on the way back, the gradient of what comes in."""
    factor: Tensor | None = None
    """A: of the rows of every B, [H, 1 or K], or dense, [H, K, K]. None where it is not wanted, and on the way back,
    where it is transposed."""


@dataclass(frozen=True)
class Done:
    """What a generator returns."""

    results: tuple[Tensor | None, ...]
    """The output; on the way back, the gradients of the inputs, in their order."""
    kept: tuple[Tensor, ...] = ()
    """For the way back, beside the inputs."""
    forgotten: tuple[int, ...] = ()
    """Inputs, by number, that the way back does not read: it gets None."""


Steps = Generator[Passed | None, States | None, Done]


@dataclass(frozen=True)
class Halves:
    """Both directions of a backend."""

    forward: Callable[..., Steps]
    """Takes an open table, the inputs, `through`: whether A is wanted, and the options."""
    backward: Callable[..., Steps]
    """Takes an open table, the inputs, what was kept, the gradient of the output, and the options."""
    dense: bool = False
    """A is a matrix."""
    apart: int = 0
    """So many of the inputs, the last ones, are not of tokens."""
    most: int = 256
    """Channels of a head's keys that it takes."""


def finished(steps: Steps, states: Sequence[Tensor]) -> Done:
    """The result of a generator that waits for these states."""
    try:
        steps.send(list(states))
    except StopIteration as end:
        return end.value
    raise AssertionError("it yields twice")


def open_table(segments: Segments) -> ChunkTable:
    """The table of a span whose first document began before it and whose last one goes on.

    Kernels know by `first` where documents begin and end: no chunk is the first of document 0, nor the last of the last
    one.
    """
    table = table_of(segments)
    out = torch.full_like(table.first_N1[:1], -1)
    first = torch.cat([out, table.first_N1[1:-1], out, table.first_N1[-1:]])
    return ChunkTable(table.start_M, table.end_M, table.segment_M, first)


def side_by_side(parts: Sequence[Steps], widths: Sequence[int], join: Callable[[Sequence[Done]], Done]) -> Steps:
    """Generators of parts of the values as one, whose states are theirs, column by column."""
    if len(parts) == 1:
        return (yield from parts[0])
    passed: list[Any] = [next(part) for part in parts]
    yield Passed([torch.cat(written, -1) for written in zip(*(p.written for p in passed))], passed[0].factor)
    for part in parts:
        next(part)
    states = yield None
    assert states is not None
    split = zip(*(state.split(list(widths), -1) for state in states))
    return join([finished(part, own) for part, own in zip(parts, split)])


Join = Callable[..., None]
"""Makes of what leaves stretches, and of their transitions, what enters them: `join` of a dense recurrence."""


def joined(
    summaries: Tensor, transitions: Tensor, join: Join, enter: Tensor | None, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """What enters the stretches of a dense recurrence, [S, H, K, V], and what leaves the last one, [H, K, V]."""
    states, leave = summaries.clone(), torch.empty_like(summaries[0])
    join(states, transitions, reverse=reverse, enter=None if enter is None else enter.contiguous(), leave=leave)
    return states, leave


def span_of(summaries: Tensor, transitions: Tensor, join: Join, through: bool) -> Passed:
    """B [H, K, V] of all stretches, and A [H, K, K] by more columns that begin as the identity."""
    if not through:
        return Passed([joined(summaries, transitions, join, None)[1]])
    _, H, K, V = summaries.shape
    states = F.pad(summaries, (0, K))
    enter = F.pad(torch.eye(K, device=summaries.device), (V, 0)).expand(H, K, V + K)
    leave = torch.empty_like(states[0])
    join(states, transitions, reverse=False, enter=enter.contiguous(), leave=leave)
    written, factor = leave.split((V, K), -1)
    return Passed([written], factor)
