"""A pool of processes that makes a test over 2 to 8 gloo ranks on the CPU one line.

    def total(rank, size):                       # top level, so that it can be pickled by name
        x = torch.full((size,), float(rank))
        dist.all_reduce(x)
        return x

    def test_all_ranks_add_up(ranks):
        assert all(x[0] == 6 for x in ranks(4, total, 3))

Importing torch costs seconds, so the workers outlive the tests: they are forked when first needed, off servers that
have imported it, and every call gives the first n of them a fresh default process group of world size n. Between calls
a worker forgets what a dead process group would spoil (sharding caches, compiled graphs, default dtype and device)
and what would keep a dead group's threads alive.

A call that fails stops the workers that took part; the next call starts new ones. So a rank that raised, died or
hangs cannot reach into another test. The error carries the traceback of the rank that failed first, and for a
hanging rank the stack it hangs in.

This file imports no torch at its top: a server sets the environment (one thread, no GPU, loopback) before that.
"""

import faulthandler
import gc
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

from fork_server import Forked, ForkServer

MAX_RANKS = 8
SERVERS = 2
"""Neighbours are forked off different ones, whose hash seeds differ as those of real ranks do."""
PRELOADED = ("torch.distributed.tensor", "torch._dynamo", "torchlinearmoe.trainer")
TIMEOUT = 120.0
GRACE = 3.0  # seconds that the other ranks get to report after one has failed
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo",
}

CACHE = type(cache(len))
CACHES: WeakSet[Any] = WeakSet()
"""Of torch.distributed, found so far."""


class RankError(AssertionError):
    """A rank of a call raised, died or did not answer in time; the message names it and carries its traceback."""


class Call(NamedTuple):
    """What a worker needs for one call: the pickled (function, arguments), its group, and the parent's import path."""

    work: bytes
    rank: int
    world_size: int
    port: int
    prefix: str
    timeout: float
    path: list[str]


class Worker:
    """One process that answers calls until its connection closes."""

    def __init__(self, server: ForkServer, stack_file: Path) -> None:
        self.stack_file = stack_file
        self.process: Forked = server.fork(_serve, str(stack_file))
        self.connection = self.process.connection

    def hanging_in(self) -> str:
        """The stacks of the process's threads, as faulthandler writes them."""
        self.stack_file.write_text("")
        os.kill(self.process.pid, signal.SIGUSR1)
        for _ in range(20):
            time.sleep(0.1)
            if text := self.stack_file.read_text():
                return text.strip()
        return "no stack: the process did not answer the signal"


class RankPool:
    """``pool(n, fn, *args)`` runs ``fn(rank, *args)`` on n ranks and returns the n results in rank order.

    Args:
        timeout: seconds after which a call fails, for its collectives and as a whole; a call may give its own
            as ``pool(n, fn, *args, timeout=300)``.
    """

    def __init__(self, timeout: float = TIMEOUT) -> None:
        import torch.distributed as dist

        self.timeout = timeout
        self.servers: list[ForkServer] = []
        self.workers: list[Worker] = []
        self.started = self.calls = 0
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        # The store lives here and picks a free port by itself; a call sees it through a prefix of its own.
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def __call__(self, world_size: int, fn: Callable[..., Any], *args: Any, timeout: float | None = None) -> list[Any]:
        """Run ``fn(rank, *args)`` on ``world_size`` ranks.

        Arguments and results are pickled: tensors on the CPU pass, a DTensor does not (return its ``full_tensor()``).

        Raises:
            RankError: a rank raised, died, or took longer than the timeout.
        """
        if not 1 <= world_size <= MAX_RANKS:
            raise ValueError(f"world_size={world_size} is not in 1..{MAX_RANKS}")
        timeout = self.timeout if timeout is None else timeout
        work = pickle.dumps((fn, args))
        if not self.servers:
            self.servers = [ForkServer(PRELOADED, ENVIRONMENT) for _ in range(SERVERS)]
        while len(self.workers) < max(world_size, 2):
            stack_file = Path(self.folder.name) / f"stack-{self.started}"
            self.workers.append(Worker(self.servers[self.started % SERVERS], stack_file))
            self.started += 1
        self.calls += 1
        try:
            for rank in range(world_size):
                prefix = f"call-{self.calls}"
                call = Call(work, rank, world_size, self.store.port, prefix, timeout, list(sys.path))
                self.workers[rank].connection.send(call)
            return self._collect(self.workers[:world_size], timeout)
        except BaseException:
            for worker in self.workers[:world_size]:
                worker.process.kill()
            del self.workers[:world_size]
            raise

    def _collect(self, workers: Sequence[Worker], timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: list[tuple[float, int, str]] = []  # (when it failed, rank, traceback)
        waiting = {worker.connection: rank for rank, worker in enumerate(workers)}
        deadline = time.monotonic() + timeout
        while waiting and (remaining := deadline - time.monotonic()) > 0:
            for connection in wait(list(waiting), remaining):
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    answer = connection.recv()
                except (EOFError, ConnectionResetError):
                    answer = 0.0, f"died with exit code {workers[rank].process.exit_code()}"
                if isinstance(answer, bytes):
                    results[rank] = pickle.loads(answer)
                else:
                    failures.append((answer[0], rank, answer[1]))
                    deadline = min(deadline, time.monotonic() + GRACE)
        if failures:  # the first in full, the last line of the others: most of them only lost their peer
            (_, rank, text), *others = sorted(failures)
            texts = {rank: text} | {rank: text.splitlines()[-1] for _, rank, text in others}
        else:
            texts = {rank: f"no answer after {timeout:g} s:\n{workers[rank].hanging_in()}" for rank in waiting.values()}
        if texts:
            raise RankError("".join(f"\nrank {rank} of {len(workers)}: {text}" for rank, text in texts.items()))
        return [results[rank] for rank in range(len(workers))]

    def close(self) -> None:
        """Kill every worker."""
        for worker in self.workers:
            worker.process.kill()
        self.workers.clear()
        for server in self.servers:
            server.stop()
        self.servers.clear()
        self.folder.cleanup()


def _serve(connection: Connection, stack_file: str) -> None:
    """The life of a worker: receive a `Call`, run it, send the pickled result, or (time, traceback) and exit.

    The exit closes the sockets, so that ranks waiting for this one fail at once.
    """
    with open(stack_file, "a") as stacks:
        faulthandler.register(signal.SIGUSR1, stacks)
        import torch

        torch.set_num_threads(1)
        warnings.filterwarnings("error", module="torchlinearmoe")  # pytest's own filters do not reach here
        while True:
            try:
                call: Call = connection.recv()
            except EOFError:
                return
            try:
                connection.send(_run(call))
            except BaseException:
                connection.send((time.monotonic(), traceback.format_exc().strip()))
                os._exit(1)


def _run(call: Call) -> bytes:
    import torch
    import torch.distributed as dist

    sys.path[:] = call.path
    _note_caches()
    gc.freeze()  # what was there before the call is large, and no garbage of the call
    os.environ.update(RANK=str(call.rank), LOCAL_RANK=str(call.rank), WORLD_SIZE=str(call.world_size))
    torch.manual_seed(0)
    fn, args = pickle.loads(call.work)
    timeout = timedelta(seconds=call.timeout)
    store = dist.TCPStore("127.0.0.1", call.port, is_master=False, timeout=timeout)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(call.prefix, store),
        rank=call.rank,
        world_size=call.world_size,
        timeout=timeout,
    )
    result = pickle.dumps(fn(call.rank, *args))
    dist.barrier()
    dist.destroy_process_group()
    _forget()
    return result


def _forget() -> None:
    """Drop what outlives a process group: cached shardings and graphs hold meshes whose groups are gone."""
    import torch

    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor._redistribute import clear_redistribute_planner_cache
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()
        clear_redistribute_planner_cache()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    # Every gloo group that is kept alive keeps its threads; models and meshes are cycles, and caches hold meshes.
    _note_caches()
    for found in CACHES:
        found.cache_clear()
    gc.collect()


def _note_caches() -> None:
    """Find the caches of torch.distributed that are not frozen yet: nothing lists frozen objects."""
    for found in gc.get_objects():
        if type(found) is CACHE and str(found.__module__).startswith("torch.distributed."):
            CACHES.add(found)
