"""What is in prepared data: counts, lengths, and how often a document is there again."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np

AT_ONCE = 1 << 24
"""Keys that are sorted together."""
BUCKETS = 256
SCRATCH = ".keys-"
"""How the folder begins that keys are sorted in."""


@dataclass
class Summary:
    """Of documents that were tokenised."""

    documents: int = 0
    tokens: int = 0
    """Markers between documents included."""
    bytes: int = 0
    """Of text, in UTF-8."""
    longest: int = 0
    """Tokens of the longest document."""
    lengths: list[int] = field(default_factory=list)
    """lengths[i]: documents of 2^i to 2^(i + 1) - 1 tokens."""
    blank: int = 0
    """Texts of white space alone, which are left out."""
    bad_lines: int = 0
    """Lines and rows without a text, which were passed over."""
    trained: int = 0
    """Tokens that are trained, of messages; of text all are."""
    duplicates: int = 0
    """Documents whose text is that of an earlier one."""

    def add(self, other: Summary) -> None:
        """Take in what is known of other documents."""
        for name in ("documents", "tokens", "bytes", "blank", "bad_lines", "trained", "duplicates"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        size = max(len(self.lengths), len(other.lengths))
        self.lengths = [sum(pair) for pair in zip(*(_filled(some, size) for some in (self.lengths, other.lengths)))]

    def add_lengths(self, lengths: np.ndarray) -> None:
        """Take in the tokens of some documents, int64 [documents]."""
        if len(lengths):
            counts = np.bincount(np.log2(lengths).astype(np.int64)).tolist()
            self.add(Summary(len(lengths), int(lengths.sum()), longest=int(lengths.max()), lengths=counts))

    def described(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"bytes_a_token": round(self.bytes / max(self.tokens, 1), 4)}

    def table(self) -> list[str]:
        """Lines to read."""
        rows = [
            ("documents", f"{self.documents:,}"),
            ("tokens", f"{self.tokens:,}"),
            ("bytes of text", f"{self.bytes:,}"),
            ("bytes a token", f"{self.bytes / max(self.tokens, 1):.3f}"),
            ("longest document", f"{self.longest:,} tokens"),
            ("duplicates", f"{self.duplicates:,}"),
            ("blank texts left out", f"{self.blank:,}"),
            ("bad lines skipped", f"{self.bad_lines:,}"),
        ]
        if self.trained:
            rows.insert(2, ("of them trained", f"{self.trained:,}"))
        lines = [f"{name:22}{value:>20}" for name, value in rows]
        lines.append("tokens a document")
        most = max([*self.lengths, 1])
        for power, count in enumerate(self.lengths):
            if count:
                bar = "#" * -(-40 * count // most)
                lines.append(f"  {2**power:>11,} to {2 ** (power + 1) - 1:>11,} {count:>14,}  {bar}")
        return lines


def _filled(counts: Sequence[int], size: int) -> list[int]:
    return [*counts, *[0] * (size - len(counts))]


def count_duplicates(keys: Iterable[np.ndarray], total: int, scratch: Path) -> int:
    """How many of `total` keys, uint64 and given in arrays, are there before; memory is that of AT_ONCE keys.

    Two texts of one key count as one: among 10^9 documents that happens to any two of them once in about thirty times.
    """
    if total <= AT_ONCE:
        found = np.concatenate([np.asarray(some) for some in keys] or [np.empty(0, np.uint64)])
        return len(found) - len(np.unique(found))
    folder = Path(mkdtemp(prefix=SCRATCH, dir=scratch))
    try:
        with ExitStack() as open_files:
            files = [open_files.enter_context((folder / str(b)).open("wb")) for b in range(BUCKETS)]
            for some in keys:
                for start in range(0, len(some), AT_ONCE):
                    part = np.sort(some[start : start + AT_ONCE])
                    edges = np.searchsorted(part, np.arange(1, BUCKETS, dtype=np.uint64) << np.uint64(56))
                    for file, bucket in zip(files, np.split(part, edges)):
                        file.write(bucket.tobytes())
        buckets = (np.fromfile(folder / str(b), np.uint64) for b in range(BUCKETS))
        return sum(len(bucket) - len(np.unique(bucket)) for bucket in buckets)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
