"""The process a rank runs in: its device, its process group, its signals."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from torchlinearmoe.errors import RecipeError, UserError
from torchlinearmoe.recipe.schema import TrainingRecipe

T = TypeVar("T")


def world_size() -> int:
    """Ranks, from torchrun's environment; 1 without it. Raises UserError where no launcher has made that."""
    ranks = _number("WORLD_SIZE", 1, 1, 10**6)
    _number("RANK", 0, 0, ranks - 1)
    _number("LOCAL_RANK", 0, 0, ranks - 1)
    _number("MASTER_PORT", 1, 0, 2**16 - 1)
    if ranks > 1 and not _is_launched():
        raise UserError(
            f"WORLD_SIZE = {ranks}: there is no MASTER_ADDR and RANK with it; start with torchrun "
            f"--nproc_per_node={ranks}, or unset it"
        )
    return ranks


def _number(name: str, default: int, least: int, most: int) -> int:
    """A variable of a launcher."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 9 and least <= int(text) <= most):
        raise UserError(
            f"{name} = '{text}' in the environment: must be a number from {least} to {most}; start with torchrun, or "
            "unset it"
        )
    return int(text)


def _is_launched() -> bool:
    return "MASTER_ADDR" in os.environ and "RANK" in os.environ


def choose_device(training: TrainingRecipe) -> torch.device:
    """This rank's device."""
    local = _number("LOCAL_RANK", 0, 0, 10**6)
    wanted = training.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda":
        if not torch.cuda.is_available():
            raise RecipeError("training.device = 'cuda': no GPU is visible; use 'cpu' or 'auto'")
        if local >= torch.cuda.device_count():
            raise RecipeError(
                f"training.device = 'cuda': {torch.cuda.device_count()} GPUs for local rank {local}; "
                "start at most one process a GPU"
            )
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    return torch.device("cpu")


def choose_dtype(training: TrainingRecipe, device: torch.device) -> torch.dtype:
    """The run's compute type."""
    if training.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[training.dtype]


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """A process group over all ranks: NCCL on GPUs, gloo on CPUs; of one process where there is no launcher."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=30)
    if _is_launched():
        _join(backend, timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _join(backend: str, timeout: timedelta) -> None:
    """Meet the other ranks of a launcher.

    torchrun keeps its store when it starts a failed group again, with the addresses of dead ranks in it (torch 2.13),
    so each attempt meets under a name of its own.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=timeout)
        return
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    attempt = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=size, timeout=timeout)


def on_rank_0(action: Callable[[], T], /) -> T:
    """What `action` returns on rank 0, which does it while the others wait; its UserError is raised on all.

    They wait however long it takes, and end with an error when rank 0 ends.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = str(error)
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, src=0, group=_patient_group())
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


_patient: list[Any] = [None, None]
"""A process group of all, and the group of the same ranks that waits."""


def _patient_group() -> dist.ProcessGroup:
    """All ranks over gloo, whose collectives have no limit of time worth the name."""
    if _patient[0] is not dist.group.WORLD:
        _patient[:] = dist.group.WORLD, dist.new_group(backend="gloo", timeout=timedelta(days=365))
    return _patient[1]


class StopSignal:
    """Remembers SIGTERM or Ctrl-C until the loop comes round; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
