"""`benchmark prepare`: megabytes of text a second that become token shards, beside the tokenizer's own library alone.

Documents drawn from the corpus that ships, sentences in random order, as JSON lines. The library encodes the same
texts, read before, in batches as large as `prepare`'s, with one thread. Every contestant is a process of its own; what
a process takes for one document, its start, is taken off. The share that a core keeps up is of CPU time, so that it
holds on a busy machine; wall time is beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torchlinearmoe.benchmark.contest import run_contestant, show
from torchlinearmoe.data.sources import find_sources, read_documents
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.errors import RecipeError, UserError

ONE = "torchlinearmoe.benchmark.prepare_one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    cores = os.cpu_count() or 1
    parser.add_argument("--tokenizer", help="tiktoken file or tokenizer.json (default: the one that ships)")
    parser.add_argument("--megabytes", type=float, default=64, help="of text (default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=int,
        nargs="+",
        default=sorted({1, cores}),
        help="processes of `prepare`, a row each (default: 1 and all cores)",
    )
    parser.add_argument("--timeout", type=float, default=600, help="seconds a contestant (default: %(default)s)")


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Measure all and print their table; 1 when the library alone could not be timed."""
    if overrides:
        raise RecipeError(f"{overrides[0]}: preparing has no recipe; see --help")
    for name, values in {"megabytes": [arguments.megabytes], "workers": arguments.workers}.items():
        if min(values) < 1:
            raise RecipeError(f"--{name} {min(values)}: must be at least 1")
    path = str(load_tokenizer(arguments.tokenizer).path)
    with TemporaryDirectory(prefix="torchlinearmoe-") as name:
        folder = Path(name)
        size = write_documents(folder / "all.jsonl", arguments.megabytes)
        write_documents(folder / "one.jsonl", 0)
        alone = run_contestant(ONE, {"tokenizer": path, "file": str(folder / "all.jsonl")}, arguments.timeout)
        rows = [{"contestant": "library alone"} | _rates(size, alone)]
        print(rows[-1], flush=True)
        for workers in dict.fromkeys(arguments.workers):
            took = [
                _prepare(folder / f"{file}.jsonl", folder / f"{file}-{workers}", path, workers, arguments.timeout)
                for file in ("one", "all")
            ]
            figures = {"wall_s": took[1].wall - took[0].wall, "cpu_s": took[1].cpu - took[0].cpu}
            if min(figures.values()) <= 0:
                raise UserError(f"--megabytes {arguments.megabytes}: took no longer than a start does; give more")
            row = {"contestant": f"prepare --workers {workers}"} | _rates(size, figures)
            if "error" not in alone:
                row["of the library, a core"] = alone["cpu_s"] / figures["cpu_s"]
                row["times the library, wall"] = alone["wall_s"] / figures["wall_s"]
            rows.append(row | {"start, s": took[0].wall})
            print(rows[-1], flush=True)
    show(f"prepare, {size / 1e6:,.1f} MB of text, {Path(path).name}, {os.cpu_count()} cores", rows)
    return 1 if "error" in alone else 0


def write_documents(file: Path, megabytes: float) -> int:
    """At least so many megabytes of text, at least one document; the bytes of text."""
    chapters = [re.split(r"(?<=[.?!]) +", text) for text in read_documents(find_sources().files)]
    draw, written = random.Random(0), 0
    with file.open("w", encoding="utf-8") as lines:
        while written < megabytes * 1e6 or not written:
            sentences = draw.choice(chapters)
            text = " ".join(draw.sample(sentences, len(sentences)))
            lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())
    return written


@dataclass(frozen=True)
class _Took:
    wall: float
    cpu: float


def _prepare(file: Path, output: Path, tokenizer: str, workers: int, timeout: float) -> _Took:
    """Raises UserError when it fails."""
    command = [sys.executable, "-m", "torchlinearmoe.prepare", str(file), "--output", str(output)]
    command += ["--tokenizer", tokenizer, "--workers", str(workers)]
    before, begun = os.times(), time.perf_counter()
    # `tokenizers` asks for its threads when it is imported, before it is told of one.
    environment = {**os.environ, "RAYON_NUM_THREADS": "1"} if workers == 1 else None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    except subprocess.TimeoutExpired:
        raise UserError(f"prepare --workers {workers}: no end in {timeout:.0f} s; give a longer --timeout") from None
    wall, after = time.perf_counter() - begun, os.times()
    if done.returncode:
        raise UserError(f"prepare --workers {workers}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return _Took(wall, cpu)


def _rates(size: int, figures: dict[str, Any]) -> dict[str, Any]:
    if "error" in figures:
        return figures
    return {
        "MB/s": size / 1e6 / figures["wall_s"],
        "MB/s a core": size / 1e6 / figures["cpu_s"],
    }
