"""The micro-batches of one data rank.

An optimizer step takes G samples: A accumulation steps of m samples on each of R data ranks, G = A * R * m. Step s,
accumulation a, rank r gets the global samples

    s * G + (a * R + r) * m  ...  + m - 1

so the samples of a step are the same on any number of ranks, and of workers, and the only state is the next step.

    G = 8, m = 2        R = 1: a = 0 1 2 3     R = 2: a = 0 1      R = 4: a = 0
    samples 0 1         r0 a0                  r0 a0               r0 a0
    samples 2 3         r0 a1                  r1 a0               r1 a0
    samples 4 5         r0 a2                  r0 a1               r2 a0
    samples 6 7         r0 a3                  r1 a1               r3 a0

Validation goes through the held-out samples in order, every sample once, and the same number of micro-batches on every
rank: where samples run out, ignored ones take their place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import NamedTuple

from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from torchlinearmoe.data.packing import MicroBatch, Order, SampleSource, collate
from torchlinearmoe.data.splits import Stream
from torchlinearmoe.errors import UserError


class Packed(NamedTuple):
    """How documents fill samples."""

    begun: float
    """Documents that begin in them."""
    cut: float
    """Of these, the ones that other samples go on with."""
    filled: float
    """Tokens that are no padding."""
    places: float
    """Tokens with the padding."""

    def figures(self) -> dict[str, float]:
        """Shares, as they are logged; that of documents is not a number where none begins."""
        return {
            "data/cut_documents": self.cut / self.begun if self.begun else float("nan"),
            "data/padding": 1 - self.filled / self.places,
        }


class TrainingLoader:
    """Iterating gives one optimizer step at a time: the list of its A micro-batches on this rank.

    Iteration begins at the step that `state_dict` tells, and the state moves on when a step has been handed out.
    """

    def __init__(
        self,
        batches: Dataset[MicroBatch],
        *,
        figures: Callable[[int], dict[str, float]],
        accumulation: int,
        start_step: int,
        stop_step: int | None,
        workers: int,
        pin_memory: bool,
    ) -> None:
        self._batches = batches
        self.accumulation = accumulation
        """A, micro-batches of one step on this rank."""
        self.next_step = start_step
        """The step that comes next."""
        self.figures = figures
        """What is worth logging of the data of the first so many steps."""
        self.packed = Packed(0, 0, 0, 0)
        """What this rank's samples hold of the step that was handed out last."""
        self._stop_step = stop_step
        self._workers = workers
        self._pin_memory = pin_memory

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        first = self.next_step * self.accumulation
        indices = count(first) if self._stop_step is None else range(first, self._stop_step * self.accumulation)
        batches = _read(self._batches, indices, self._workers, self._pin_memory)
        while step := list(islice(batches, self.accumulation)):
            self.next_step += 1
            self.packed = Packed(
                sum(batch.begun for batch in step),
                sum(batch.cut for batch in step),
                sum(batch.counted_tokens for batch in step),
                sum(len(batch.tokens) for batch in step),
            )
            yield step

    def state_dict(self) -> dict[str, int]:
        """The next step: all there is to save, whatever the layout."""
        return {"next_step": self.next_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on at a saved state; an iteration under way is not affected."""
        self.next_step = int(state["next_step"])


class ValidationLoader:
    """Iterating gives this rank's micro-batches of the held-out split, always the same ones."""

    def __init__(self, batches: Dataset[MicroBatch], num_batches: int, workers: int, pin_memory: bool) -> None:
        self._batches = batches
        self._num_batches = num_batches
        self._workers = workers
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        """Micro-batches, the same on every rank."""
        return self._num_batches

    def __iter__(self) -> Iterator[MicroBatch]:
        return _read(self._batches, range(self._num_batches), self._workers, self._pin_memory)


def build_loader(
    stream: Stream,
    *,
    sequence_length: int,
    micro_batch_size: int,
    samples_per_step: int,
    seed: int,
    rank: int = 0,
    ranks: int = 1,
    start_step: int = 0,
    stop_step: int | None = None,
    first_sample: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
) -> TrainingLoader:
    """Training micro-batches of data rank `rank` of `ranks`, from `start_step` up to `stop_step` (None: without end).

    `first_sample` is where the order over these data began, see `fingerprint.py`. `workers` processes read ahead (0:
    read when asked). Raises UserError when the stream is shorter than one sample,
    and when a step is not whole micro-batches on every rank.
    """
    samples = stream.samples(sequence_length)
    if not len(samples):
        raise UserError(f"training.sequence_length = {sequence_length}: {stream.shortage()}")
    accumulation, rest = divmod(samples_per_step, micro_batch_size * ranks)
    if rest or not accumulation:
        raise UserError(
            f"training.tokens_per_step = {samples_per_step * sequence_length}: must be a multiple of "
            f"sequence_length * micro_batch_size * data ranks = {sequence_length} * {micro_batch_size} * {ranks}"
        )
    order = samples.order(seed, first_sample)
    batches = _TrainingBatches(samples, order, micro_batch_size, rank, ranks)
    return TrainingLoader(
        batches,
        figures=lambda step: order.figures(step * samples_per_step),
        accumulation=accumulation,
        start_step=start_step,
        stop_step=stop_step,
        workers=workers,
        pin_memory=pin_memory,
    )


def build_validation_loader(
    stream: Stream,
    *,
    sequence_length: int,
    micro_batch_size: int,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> ValidationLoader:
    """Held-out micro-batches of data rank `rank` of `ranks`; every label of the stream is in exactly one of them."""
    samples = stream.samples(sequence_length, tail=True)
    batches = _ValidationBatches(samples, micro_batch_size, rank, ranks)
    return ValidationLoader(batches, -(-len(samples) // (micro_batch_size * ranks)), workers, pin_memory)


class _TrainingBatches(Dataset[MicroBatch]):
    """Micro-batch number s * A + a of this rank, of any step s and accumulation a."""

    def __init__(self, samples: SampleSource, order: Order, micro_batch_size: int, rank: int, ranks: int) -> None:
        self.samples, self.order = samples, order
        self.micro_batch_size, self.rank, self.ranks = micro_batch_size, rank, ranks

    def __getitem__(self, index: int) -> MicroBatch:
        # s * G + (a * R + r) * m with G = A * R * m is ((s * A + a) * R + r) * m.
        first = (index * self.ranks + self.rank) * self.micro_batch_size
        return collate([self.samples[self.order[g]] for g in range(first, first + self.micro_batch_size)])


class _ValidationBatches(Dataset[MicroBatch]):
    """Micro-batch number `index` of this rank; samples beyond the last are ignored ones."""

    def __init__(self, samples: SampleSource, micro_batch_size: int, rank: int, ranks: int) -> None:
        self.samples, self.micro_batch_size, self.rank, self.ranks = samples, micro_batch_size, rank, ranks

    def __getitem__(self, index: int) -> MicroBatch:
        first = (index * self.ranks + self.rank) * self.micro_batch_size
        numbers = range(first, first + self.micro_batch_size)
        return collate([self.samples[i] if i < len(self.samples) else self.samples.ignored() for i in numbers])


def _read(batches: Dataset[MicroBatch], indices: Iterable[int], workers: int, pin_memory: bool) -> Iterator[MicroBatch]:
    """`batches[i]` for i in `indices`, in this order, read by `workers` processes ahead of need."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata 0.11 on torch 2.13
        loader = StatefulDataLoader(
            batches,
            batch_size=None,  # an item is a micro-batch already
            sampler=indices,
            num_workers=workers,
            pin_memory=pin_memory,
            # The loader's own state is not used: it would tie a checkpoint to the number of workers.
            snapshot_every_n_steps=1 << 30,
        )
    try:
        yield from loader
    except UserError as error:  # from another process it comes with that one's stack
        raise UserError(str(error).rpartition("errors.UserError: ")[2]) from None
