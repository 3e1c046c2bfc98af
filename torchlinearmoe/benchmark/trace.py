"""A torch.profiler trace as pieces of work, each with what the host was doing when it was launched.

    host, forward    benchmark/recurrence [ CompiledFunction (sequence 7) [ launch a ] ]
    host, backward   CompiledFunctionBackward (sequence 7) [ launch b ]
    device           kernel a ..... kernel b

Kernel a was launched inside the label. Kernel b was not, but the backward that launched it carries the sequence number
of its forward, which was: both serve the recurrence. A forward may see a number several times before an operation uses
it up; the last event to begin with it is the one that did.

On a machine without an accelerator an operation's own time, without that of the operations it calls, is a piece.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchlinearmoe.benchmark.labels import PREFIX

Events = list[dict[str, Any]]
_OPERATIONS, _RANGES = "cpu_op", "user_annotation"
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Piece:
    """A kernel, copy or fill of the device, or an operation of the CPU."""

    name: str
    start: float
    end: float
    """In microseconds."""
    own: float
    """Microseconds that are its own."""
    around: tuple[str, ...] = ()
    """Names of the host-side events around its launch, innermost first."""
    label: str | None = None
    """The innermost label around its launch, or around its forward's."""


@dataclass
class Host:
    """An event of a host thread."""

    name: str
    kind: str
    start: float
    end: float
    sequence: int = -1
    backward: bool = False
    parent: Host | None = None
    called: float = 0.0
    """Microseconds of the operations it calls."""

    def chain(self) -> Iterator[Host]:
        """Itself and what it lies in, innermost first."""
        host: Host | None = self
        while host is not None:
            yield host
            host = host.parent


def load_events(path: Path) -> Events:
    """The events of an exported Chrome trace."""
    return [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]


def device_pieces(events: Events) -> list[Piece]:
    """Everything the device did, in order."""
    hosts, launches = _nest(events)
    forwards = _forwards(hosts)
    pieces = []
    for event in events:
        if event.get("cat") in _DEVICE:
            launch = launches.get(event.get("args", {}).get("correlation"))
            around = launch.parent if launch is not None else None
            start, length = float(event["ts"]), float(event["dur"])
            pieces.append(_piece(event["name"], start, start + length, length, around, forwards))
    return sorted(pieces, key=lambda piece: piece.start)


def host_pieces(events: Events) -> list[Piece]:
    """Every operation of the CPU, in order; an operation itself is the innermost event around it."""
    hosts, _ = _nest(events)
    forwards = _forwards(hosts)
    operations = [host for host in hosts if host.kind == _OPERATIONS]
    for host in operations:
        caller = next((other for other in host.chain() if other is not host and other.kind == _OPERATIONS), None)
        if caller is not None:
            caller.called += host.end - host.start
    return [_piece(h.name, h.start, h.end, max(0.0, h.end - h.start - h.called), h, forwards) for h in operations]


def busy(pieces: Iterable[Piece]) -> float:
    """Microseconds in which at least one piece was under way."""
    total, until = 0.0, float("-inf")
    for piece in sorted(pieces, key=lambda piece: piece.start):
        total += max(0.0, piece.end - max(piece.start, until))
        until = max(until, piece.end)
    return total


def _piece(
    name: str, start: float, end: float, own: float, host: Host | None, forwards: dict[int, list[Host]]
) -> Piece:
    around = tuple(h.name for h in host.chain()) if host is not None else ()
    return Piece(name, start, end, own, around, _label(host, forwards))


def _label(host: Host | None, forwards: dict[int, list[Host]]) -> str | None:
    """The innermost label; a backward outside all labels has its forward's."""
    for h in host.chain() if host is not None else ():
        if h.kind == _RANGES and h.name.startswith(PREFIX):
            return h.name.removeprefix(PREFIX)
        if h.backward:
            earlier = [forward for forward in forwards.get(h.sequence, ()) if forward.start < h.start]
            if earlier and (found := _label(earlier[-1], {})) is not None:
                return found
    return None


def _forwards(hosts: list[Host]) -> dict[int, list[Host]]:
    """Events of forwards by sequence number, in order of their beginning."""
    found: dict[int, list[Host]] = defaultdict(list)
    for host in hosts:
        if host.sequence >= 0 and not host.backward:
            found[host.sequence].append(host)
    return {sequence: sorted(some, key=lambda host: host.start) for sequence, some in found.items()}


def _nest(events: Events) -> tuple[list[Host], dict[int, Host]]:
    """The events of all host threads, each with the one it lies in; and launches by correlation."""
    threads: dict[Any, list[tuple[Host, int | None]]] = defaultdict(list)
    for event in events:
        kind = event.get("cat")
        if kind in (_OPERATIONS, _RANGES, *_LAUNCHES):
            args = event.get("args", {})
            start = float(event["ts"])
            host = Host(event["name"], kind, start, start + float(event["dur"]))
            host.sequence = int(args.get("Sequence number", -1))
            host.backward = host.sequence >= 0 and int(args.get("Fwd thread id", 0)) > 0
            threads[event["tid"]].append((host, args.get("correlation") if kind in _LAUNCHES else None))
    hosts: list[Host] = []
    launches: dict[int, Host] = {}
    for thread in threads.values():
        stack: list[Host] = []
        for host, correlation in sorted(thread, key=lambda entry: (entry[0].start, -entry[0].end)):
            while stack and stack[-1].end <= host.start:
                stack.pop()
            host.parent = stack[-1] if stack else None
            if correlation is None:
                stack.append(host)
                hosts.append(host)
            else:
                launches[correlation] = host
    return hosts, launches
