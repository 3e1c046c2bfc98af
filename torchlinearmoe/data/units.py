"""Files to units of work, each of which becomes a few shards: neighbouring pieces of about the same size together.

    files       a.jsonl (1 GB)                  b.jsonl.gz   c.txt d.txt e.txt
    pieces      a[0:256M] a[256M:512M] ...      b            c     d     e
    units       0         1            2 3      4            5-------------

Units follow from the files alone, not from how many processes work on them, so that the shards do as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torchlinearmoe.data.formats import compression_of, kind_of
from torchlinearmoe.data.records import Piece

UNITS = 256
"""Wanted, within the bounds of their size."""
LEAST_BYTES = 1 << 22
MOST_BYTES = 1 << 29
COMPRESSED = 4
"""Bytes of text in a compressed one, to weigh files."""

Unit = list[Piece]


def plan_units(files: Sequence[Path]) -> list[Unit]:
    """The pieces of all files in their order, in units."""
    sizes = [file.stat().st_size for file in files]
    total = sum(_weight(file, size) for file, size in zip(files, sizes))
    bound = min(max(total // UNITS, LEAST_BYTES), MOST_BYTES)
    units: list[Unit] = []
    room = 0
    for file, size in zip(files, sizes):
        for piece in _pieces(file, size, bound):
            weight = _weight(file, piece.size)
            if weight > room or not units:
                units.append([])
                room = bound
            units[-1].append(piece)
            room -= weight
    return units


def _weight(file: Path, size: int) -> int:
    return size * (COMPRESSED if compression_of(file) or kind_of(file) == ".parquet" else 1)


def _pieces(file: Path, size: int, bound: int) -> Iterator[Piece]:
    path = str(file.resolve())
    if compression_of(file) or _weight(file, size) <= bound:
        yield Piece(path, size=size)
    elif kind_of(file) == ".parquet":
        yield from _row_groups(path, size, bound)
    else:
        parts = -(-size // bound)
        edges = [size * part // parts for part in range(parts + 1)]
        for start, stop in zip(edges, edges[1:]):
            yield Piece(path, start, stop, stop - start)


def _row_groups(path: str, size: int, bound: int) -> Iterator[Piece]:
    """Ranges of row groups; a file that cannot be read is one piece, whose reading says why."""
    try:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    except (ImportError, OSError, ValueError, NotImplementedError):  # pyarrow's own are of these
        sizes = []
    total, start, inside = sum(sizes), 0, 0
    for group, text in enumerate(sizes):
        inside += text
        if inside >= bound or group == len(sizes) - 1:
            yield Piece(path, start, group + 1, size * inside // max(total, 1))
            start, inside = group + 1, 0
    if not sizes:
        yield Piece(path, size=size)
