"""How much the timed models are given."""

from __future__ import annotations

from torchlinearmoe.benchmark.multi.host import Host


def batch_of(host: Host) -> tuple[int, int]:
    """Sequences of a rank's step, and their tokens."""
    return (8, 2048) if host.cuda else (2, 64)


def span_of(host: Host) -> int:
    """Tokens of a long sequence on each rank."""
    return 32768 if host.cuda else 64


def steps_of(host: Host) -> int:
    """Steps that are timed, the first included, of which the last half counts."""
    if not host.cuda:
        return 3
    return 5 if host.quick else 13


def longest_of(host: Host) -> int:
    """Tokens of the longest sequence that is tried."""
    return 2**20 if host.cuda else 512
