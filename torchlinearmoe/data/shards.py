"""One unit of files to its shards, in this process; and the process that does so for another one.

    shards/000003-000   documents of unit 3, up to about `shard_tokens`       shard.json: records 0 .. 812 of the unit
    shards/000003-001   what follows                                          records 812 .. 1520, the last

A shard begins at a record whose number the one before it names, so any of them can be written again by itself.

A worker is `python -m torchlinearmoe.data.shards FOLDER ...`: it gets numbers of units on its input, a line each, and
says on its output how many bytes of input it has come on, which unit is done, and what went wrong. When its input ends
while it works, whoever started it is gone, and it ends too.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from torchlinearmoe.data.chat import Chat
from torchlinearmoe.data.prepared import ARRAYS, MASK, PLAN, SHARD, SHARDS, checksum, read_json
from torchlinearmoe.data.records import Bad, BadLine, Parse, Part, Piece, Reading, Record, read_records
from torchlinearmoe.data.store import BATCH_CHARACTERS, Encoded, framed, is_store, key_of, write_arrays, written_aside
from torchlinearmoe.data.summary import Summary
from torchlinearmoe.data.tokenizer import Tokenizer, load_tokenizer
from torchlinearmoe.errors import UserError

BAD = "bad.jsonl"
BATCH_TOKENS = 1 << 18
"""Of conversations that are written at once."""


@dataclass(frozen=True)
class Job:
    """How units become shards."""

    folder: Path
    units: list[list[Piece]]
    text_key: str
    skip_bad: bool
    shard_tokens: int
    chat: Chat | None = None
    """Of files of messages."""
    way_out: str = "make room there, or choose another --output"
    named: Path | None = None

    @classmethod
    def read(cls, folder: Path) -> Job:
        """What the plan of a folder says."""
        plan = read_json(folder / PLAN)
        units = [[Piece(*piece) for piece in unit] for unit in plan["units"]]
        asked = plan["asked"]
        chat = Chat.of(asked["messages"], str(folder / PLAN)) if asked.get("messages") else None
        return cls(folder, units, asked["text_key"], asked["bad_lines"] == "skip", asked["shard_tokens"], chat)

    def shard(self, unit: int, part: int) -> Path:
        """The folder of a shard."""
        return self.folder / SHARDS / f"{unit:06}-{part:03}"

    def size(self, unit: int) -> int:
        """Bytes on disk of a unit's files."""
        return sum(piece.size for piece in self.units[unit])


def is_shard(folder: Path) -> bool:
    """Whether a shard is there; a written one is whole."""
    return (folder / SHARD).is_file()


def shards_of(job: Job, unit: int) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """The shards of a unit and what is known of each; the last one is the last of the unit, or missing: None."""
    part = 0
    while True:
        folder = job.shard(unit, part)
        known = read_json(folder / SHARD) if is_shard(folder) else None
        yield folder, known
        if known is None or known["last"]:
            return
        part += 1


def _each_told(batches: Iterable[list[Encoded]], tell: Callable[[], None]) -> Iterator[list[Encoded]]:
    """The batches; `tell` after each is taken."""
    for batch in batches:
        yield batch
        tell()


def write_unit(job: Job, unit: int, tokenizer: Tokenizer, report: Callable[[int], None]) -> None:
    """Write the shards of a unit that are not there yet. `report` is called with bytes of input that were gone through.

    Raises BadLine for a line that holds no text, unless such are to be skipped, and UserError.
    """
    chat = job.chat
    parse = None if chat is None else lambda entry: chat.encode(entry, tokenizer)
    source = _UnitReader(job.units[unit], job.text_key, parse)
    told: int = 0
    part = start = 0
    while True:
        folder = job.shard(unit, part)
        if not is_shard(folder):
            source.go_to(start)
            with (
                written_aside(folder, is_shard, job.way_out, job.named or job.folder) as aside,
                (aside / BAD).open("w") as bad,
            ):
                encoder = _Encoder(source, tokenizer, job, bad)

                def tell() -> None:
                    nonlocal told
                    done = source.read()
                    report(done - told)
                    told = done

                write_arrays(aside, _each_told(encoder.batches(), tell), tokenizer)
                bad.close()
                if not encoder.summary.bad_lines:
                    (aside / BAD).unlink()
                known = _describe(aside, encoder, unit, part, start)
                (aside / SHARD).write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        known = read_json(folder / SHARD)
        start, part = known["stop"], part + 1
        if known["last"]:
            report(job.size(unit) - told)
            return


def _describe(aside: Path, encoder: _Encoder, unit: int, part: int, start: int) -> dict[str, Any]:
    written = [name for name in (*ARRAYS, MASK) if is_store(aside) and (aside / name).exists()]
    if written:
        encoder.summary.add_lengths(np.diff(np.load(aside / "offsets.npy", mmap_mode="r")))
    return {
        "unit": unit,
        "part": part,
        "start": start,
        "stop": encoder.source.place,
        "last": encoder.source.ended,
        "checksums": {name: checksum(aside / name) for name in written},
        "summary": asdict(encoder.summary),
    }


class _UnitReader:
    """The records of a unit, and how far their reading has come."""

    def __init__(self, pieces: list[Piece], key: str, parse: Parse | None) -> None:
        self._pieces, self._key, self._parse = pieces, key, parse
        self._records: Iterator[Record] | None = None
        self.place = 0
        """The number of the record that comes next."""
        self.ended = False

    def go_to(self, place: int) -> None:
        if self._records is None or place != self.place:
            self._records, self.place, self.ended = islice(self._all(), place, None), place, False

    def _all(self) -> Iterator[Record]:
        self._before = 0
        for piece in self._pieces:
            self._reading, self._size = Reading(), piece.size
            yield from read_records(piece, self._key, self._reading, self._parse)
            self._before += piece.size

    def next(self) -> Record | None:
        """The next record; None at the end."""
        assert self._records is not None
        record = next(self._records, None)
        self.place += record is not None
        self.ended = record is None
        return record

    def read(self) -> int:
        """Bytes on disk that were gone through."""
        return self._before + (0 if self.ended else min(self._reading.read(), self._size))


class _Encoder:
    """Records to encoded documents, in batches, up to the bound of a shard."""

    def __init__(self, source: _UnitReader, tokenizer: Tokenizer, job: Job, bad: TextIO) -> None:
        self.source, self._tokenizer, self._job, self._bad = source, tokenizer, job, bad
        self.summary = Summary()
        self._digest: Any = None  # of a document that is not at its end

    def batches(self) -> Iterator[list[Encoded]]:
        tokens = 0
        while not self.source.ended and (tokens < self._job.shard_tokens or self._digest is not None):
            batch = self._conversations() if self._job.chat else list(self._encode(self._draw()))
            tokens += sum(len(document.ids) for document in batch)
            yield batch

    def _skip(self, record: Bad) -> None:
        if not self._job.skip_bad:
            raise BadLine(str(record))
        self.summary.bad_lines += 1
        told = {"file": str(record.path), record.place: record.line, "reason": record.reason}
        self._bad.write(json.dumps(told) + "\n")

    def _conversations(self) -> list[Encoded]:
        """About BATCH_TOKENS of conversations."""
        batch: list[Encoded] = []
        tokens = 0
        while tokens < BATCH_TOKENS and (record := self.source.next()) is not None:
            if isinstance(record, Bad):
                self._skip(record)
            elif isinstance(record, Encoded):
                batch.append(record)
                tokens += len(record.ids)
                self.summary.bytes += len(self._tokenizer.decode_bytes(record.ids))
                self.summary.trained += sum(record.trained or ())
        return batch

    def _draw(self) -> list[str]:
        """Texts of BATCH_CHARACTERS together, and what is left out on the way."""
        texts: list[str] = []
        characters, open_ = 0, self._digest is not None
        while characters < BATCH_CHARACTERS and (record := self.source.next()) is not None:
            assert not isinstance(record, Encoded)
            if isinstance(record, Bad):
                self._skip(record)
                if open_ and not record.more:
                    texts.append("")
                    open_ = False
            elif open_ or isinstance(record, Part) or record.strip():
                texts.append(record)
                characters += len(record)
                open_ = isinstance(record, Part)
            else:
                self.summary.blank += 1
        return texts

    def _encode(self, texts: list[str]) -> Iterator[Encoded]:
        start = [self._tokenizer.start]
        end = [] if self._tokenizer.begin_of_text is None else [self._tokenizer.end_of_text]
        for text, ids in zip(texts, self._tokenizer.encode_arrays(texts)):
            content = text.encode()
            self.summary.bytes += len(content)
            goes_on, ends = self._digest is not None, not isinstance(text, Part)
            digest = self._digest or hashlib.blake2b(digest_size=8)
            digest.update(content)
            self._digest = None if ends else digest
            yield Encoded(key_of(digest), framed([] if goes_on else start, ids, end if ends else []), ends=ends)


def main() -> None:
    """A worker: FOLDER TOKENIZER THREADS BEGINS FINGERPRINT."""
    folder, path, threads, begins, fingerprint = sys.argv[1:]
    os.environ["RAYON_NUM_THREADS"] = threads  # what `tokenizers` goes by, when it is imported
    work: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    busy = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            work.put(int(line))
        if busy.is_set():
            os._exit(1)
        work.put(None)

    def say(kind: str, what: object) -> None:
        print(kind, what, flush=True)

    threading.Thread(target=listen, daemon=True).start()
    try:
        job = Job.read(Path(folder))
        tokenizer = load_tokenizer(path).starting(begins == "begins")
        tokenizer.threads = int(threads)
        if tokenizer.fingerprint != fingerprint:
            raise UserError(f"{path}: the tokenizer has changed meanwhile; start again")
        say("ready", "")
        while (unit := work.get()) is not None:
            busy.set()
            write_unit(job, unit, tokenizer, lambda count: say("bytes", count))
            busy.clear()
            say("done", unit)
    except UserError as error:
        say("bad" if isinstance(error, BadLine) else "error", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
