"""How much of the collectives of context parallelism a profile shows behind computation.

    stream of NCCL      |---- gather ----|        |-- reduce-scatter --|
    stream of compute  --kernel--|   |--kernel----------|
    hidden              ^^^^^^^^^     ^^            ^^^^

Mixers gather with functional collectives, FSDP2 with others, and every kernel is known by the operations around its
launch: so the gathers of states are told from those of weights, whatever the groups are called.
"""

from __future__ import annotations

from collections.abc import Sequence

from torchlinearmoe.benchmark.trace import Piece

STATES = ("_c10d_functional::all_gather_into_tensor", "_c10d_functional::reduce_scatter_tensor")
"""The operations that `parallel/exchange/gather.py` calls, forward and backward."""


def gathers(pieces: Sequence[Piece]) -> tuple[float, float]:
    """Microseconds of all gathers of states and their reduce-scatters, and of these the hidden: those in which a kernel
    that is no collective runs. `pieces`: what the device did, in order."""
    collective = [piece for piece in pieces if _is_nccl(piece)]
    others = [piece for piece in pieces if not _is_nccl(piece)]
    busy = _union([(piece.start, piece.end) for piece in others])
    total = hidden = 0.0
    for piece in collective:
        if any(name.startswith(STATES) for name in piece.around):
            total += piece.end - piece.start
            hidden += sum(max(0.0, min(end, piece.end) - max(start, piece.start)) for start, end in busy)
    return total, hidden


def _is_nccl(piece: Piece) -> bool:
    return piece.name.lower().startswith("nccl")


def _union(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans in order of their start, joined where they touch."""
    joined: list[tuple[float, float]] = []
    for start, end in spans:
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined
