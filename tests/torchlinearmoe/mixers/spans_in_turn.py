"""The spans of a context-parallel group in one process, where a device has no group of ranks to run on.

Every span is a thread with the code of a rank. One runs at a time: until it waits for a gather or an exchange, then it
is the next one's turn. What the spans give to each other is handed on inside one autograd graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from torchlinearmoe import spans
from torchlinearmoe.mixers import attention
from torchlinearmoe.parallel.exchange import states, tails


class Turn:
    """What a span has for a process group."""

    def __init__(self, size: int, rank: int, given: list[list[Tensor]], baton: list[threading.Semaphore]) -> None:
        self.size, self.rank, self._given, self._baton = size, rank, given, baton

    def give(self, x: Tensor) -> int:
        """Begin an exchange; its number."""
        self._given[self.rank].append(x)
        return len(self._given[self.rank]) - 1

    def take(self, number: int) -> list[Tensor]:
        """What every span gave, once all have had their turn."""
        self.pass_on()
        self.wait()
        return [given[number] for given in self._given]

    def wait(self) -> None:
        """Until it is this span's turn."""
        self._baton[self.rank].acquire()

    def pass_on(self) -> None:
        """Let the next span run."""
        self._baton[(self.rank + 1) % self.size].release()


def in_turn(size: int, run: Callable[[Any], Tensor], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """[run(group of span 0), ...] for `size` spans."""
    _exchange_in_process(monkeypatch)
    given: list[list[Tensor]] = [[] for _ in range(size)]
    baton = [threading.Semaphore(0) for _ in range(size)]
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def work(turn: Turn) -> None:
        turn.wait()
        try:
            results[turn.rank] = run(turn)
        except BaseException as error:  # raised again below
            errors.append(error)
        turn.pass_on()

    threads = [
        threading.Thread(target=work, args=(Turn(size, rank, given, baton),), daemon=True) for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    baton[0].release()
    threads[0].join()
    if errors:
        raise errors[0]
    for thread in threads:
        thread.join()
    return results


def _exchange_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def finish(pending: tuple[Turn, int]) -> Tensor:
        turn, number = pending
        return torch.stack(turn.take(number))

    def all_to_all(x: Tensor, turn: Turn) -> Tensor:
        return torch.stack([parts[turn.rank] for parts in turn.take(turn.give(x))])

    for module in (attention, states, tails):
        monkeypatch.setattr(module, "start_gather", lambda x, turn: (turn, turn.give(x)))
        monkeypatch.setattr(module, "finish_gather", finish)
    monkeypatch.setattr(attention, "all_to_all", all_to_all)
    known = SimpleNamespace(
        get_rank=lambda turn: turn.rank, get_world_size=lambda turn: turn.size, ProcessGroup=dist.ProcessGroup
    )
    monkeypatch.setattr(spans, "dist", known)
