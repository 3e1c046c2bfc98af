"""The clock of a run: tokens a second since the last reading, waits for data, trained time, time left, memory.

Only training counts. Validation and checkpoints go inside `with meter.paused():`.
"""

import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

GIB = 2**30

T = TypeVar("T")


@dataclass(frozen=True)
class Reading:
    """What `Meter.read` gives."""

    tokens_per_second: float
    """Since the last reading, over all ranks if the counted tokens were."""
    seconds_per_step: float
    """Since the last reading."""
    data_wait: float
    """Seconds of each step, since the last reading, in which the loader was waited for."""
    trained_seconds: float
    """Training time since the meter was made."""
    seconds_left: float
    """To the last step, at the pace of the recent readings."""


class Meter:
    """Counts steps and tokens against the wall clock; made when training starts.

    device: asynchronous work on it is waited for when the clock is stopped, so that it is not booked as a pause.
        `read` does not wait: take it after the loss was fetched.
    clock: seconds, monotone.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        step: int = 0,
        device: torch.device | str = "cpu",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        self._device = torch.device(device)
        self._total_steps = total_steps
        self._step = step
        self._step_at_reading = step
        self._tokens = 0
        self._trained = 0.0
        self._waited = 0.0
        self._since = clock()
        self._intervals = 0
        self._paces: deque[tuple[int, float]] = deque(maxlen=20)  # (steps, seconds) of the recent readings

    def add(self, tokens: int) -> None:
        """One more step is done, with `tokens` tokens over all ranks."""
        self._step += 1
        self._tokens += tokens

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the time until each of them is there is counted."""
        iterator = iter(batches)
        while True:
            start = self._clock()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += self._clock() - start
            yield batch

    def read(self) -> Reading:
        """Figures since the last reading (or the start), and begin the next interval."""
        now = self._clock()
        seconds = max(now - self._since, 1e-9)
        steps = self._step - self._step_at_reading
        self._trained += seconds
        if steps:
            if self._intervals == 1:
                self._paces.clear()  # the first interval compiled and warmed up: it was the pace only while alone
            self._intervals += 1
            self._paces.append((steps, seconds))
        recent_steps = sum(count for count, _ in self._paces)
        pace = sum(spent for _, spent in self._paces) / recent_steps if recent_steps else float("nan")
        reading = Reading(
            tokens_per_second=self._tokens / seconds,
            seconds_per_step=seconds / steps if steps else float("nan"),
            data_wait=self._waited / steps if steps else float("nan"),
            trained_seconds=self._trained,
            seconds_left=pace * max(0, self._total_steps - self._step),
        )
        self._since, self._tokens, self._step_at_reading, self._waited = now, 0, self._step, 0.0
        return reading

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside counts as no training."""
        self._wait()
        start = self._clock()
        try:
            yield
        finally:
            self._wait()
            self._since += self._clock() - start

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def peak_memory_gib(device: torch.device | str) -> float:
    """Highest memory so far in GiB: allocated by tensors on a CUDA device, resident in the process on the CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB  # bytes on macOS, KiB elsewhere
