"""`benchmark data`: the loader's tokens a second of one core, and how long a step of a given pace waits for it.

Ids drawn at random into a temporary folder, as token folders and in Megatron's form, one source and a mixture of four,
each packing; or with --recipe the data of a recipe. Tokens a second of a core are those of the process's CPU time,
whatever else the machine does, and keep up where they are more than a rank's share of the pace. The waits are of one
rank whose steps besides take as long as its share of the pace leaves them, in wall time.
"""

from __future__ import annotations

import argparse
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from torchlinearmoe.benchmark.contest import show
from torchlinearmoe.data.loader import TrainingLoader, build_loader
from torchlinearmoe.data.megatron import HEADER, MAGIC
from torchlinearmoe.data.mixture import MixedStream
from torchlinearmoe.data.open import open_data
from torchlinearmoe.data.splits import Packing, Stream, TokenStream, open_splits
from torchlinearmoe.data.store import Encoded, write_encoded
from torchlinearmoe.data.tokenizer import Tokenizer, load_tokenizer
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.metrics.meter import Meter
from torchlinearmoe.recipe import load_recipe

PACKINGS: tuple[Packing, ...] = ("concatenate", "best_fit")
PARTS = 4
"""Folders or files that the drawn data lie in: the sources of a mixture."""
HELD_OUT = 0.05
"""Of the documents, so that what is trained on lies in short stretches."""
SPREAD = 1.2
"""Standard deviation of the logarithm of a document's length."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    parser.add_argument("--recipe", help="TOML recipe whose data to read (default: drawn ones)")
    parser.add_argument("--tokens", type=int, default=1 << 24, help="of the drawn data (default: %(default)s)")
    parser.add_argument("--document", type=int, default=600, help="median tokens of one (default: %(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3, help="a figure (default: %(default)s)")
    parser.add_argument("--pace", type=float, default=1e6, help="tokens a second of a node (default: %(default)g)")
    parser.add_argument("--ranks", type=int, default=8, help="of a node (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes a rank (default: %(default)s)")


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Measure all and print their table."""
    for name, least in {"tokens": 1 << 16, "document": 1, "length": 1, "seconds": 0.1, "pace": 1, "ranks": 1}.items():
        if getattr(arguments, name) < least:
            raise RecipeError(f"--{name} {getattr(arguments, name)}: must be at least {least}")
    if arguments.workers < 0:
        raise RecipeError(f"--workers {arguments.workers}: must be at least 0")
    if overrides and not arguments.recipe:
        raise RecipeError(f"{overrides[0]}: drawn data have no recipe; name one with --recipe")
    rows = []
    with TemporaryDirectory(prefix="torchlinearmoe-") as folder:
        drawn = _drawn(Path(folder), arguments)
        cases = _of_recipe(arguments.recipe, overrides, Path(folder)) if arguments.recipe else drawn
        for told, length, stream in cases:
            rows.append(told | _measured(stream, length, arguments))
            print(rows[-1], flush=True)
    show(
        f"data, {arguments.pace:,.0f} tokens/s a node of {arguments.ranks} ranks with {arguments.workers} loader "
        "processes each",
        rows,
    )
    return 0


Case = tuple[dict[str, Any], int, Stream]
"""What it is, tokens of a sequence, and the data."""


def _of_recipe(path: str, overrides: Sequence[str], folder: Path) -> Iterator[Case]:
    recipe = load_recipe(path, overrides)
    tokenizer, length = load_tokenizer(recipe.data.tokenizer), recipe.training.sequence_length
    for packing in PACKINGS:
        train = open_data(replace(recipe.data, packing=packing), tokenizer, folder / "cache").train
        yield {"source": path, "case": packing}, length, train


def _drawn(folder: Path, arguments: argparse.Namespace) -> Iterator[Case]:
    tokenizer = load_tokenizer()
    draw = np.random.default_rng(0)
    parts = [_documents(draw, arguments.tokens // PARTS, arguments.document, tokenizer) for _ in range(PARTS)]
    paths: dict[str, list[Path]] = {"tokens": [], "Megatron": []}
    for number, documents in enumerate(parts):
        keys = draw.integers(1 << 63, size=len(documents)).tolist()
        encoded = [Encoded(2 * key, [tokenizer.start, *ids]) for key, ids in zip(keys, documents)]
        paths["tokens"].append(write_encoded(folder / f"tokens-{number}", [encoded], tokenizer).folder)
        paths["Megatron"].append(_write_megatron(folder / f"megatron-{number}", documents))
    for kind, some in paths.items():
        for packing in PACKINGS:
            stores = [open_splits([path], tokenizer=tokenizer, validation_fraction=0).stores for path in some]
            trained = (int(HELD_OUT * 2**64), 1 << 64)
            one = TokenStream([store for each in stores for store in each], trained, packing=packing)
            yield {"source": kind, "case": packing}, arguments.length, one
            mixed = {path.name: TokenStream(each, trained, packing=packing) for path, each in zip(some, stores)}
            stream = MixedStream(mixed, [4, 3, 2, 1])
            yield {"source": f"{kind}, {PARTS} mixed", "case": packing}, arguments.length, stream


def _documents(draw: np.random.Generator, tokens: int, median: int, tokenizer: Tokenizer) -> list[list[int]]:
    lengths = draw.lognormal(np.log(median), SPREAD, -(-tokens // median)).astype(np.int64) + 1
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), tokens)) + 1]
    special = {tokenizer.start, tokenizer.end_of_text}
    ids = np.array([token for token in range(tokenizer.vocab_size) if token not in special])
    return [ids[draw.integers(len(ids), size=length)].tolist() for length in lengths]


def _write_megatron(prefix: Path, documents: Sequence[Sequence[int]]) -> Path:
    """The pair of files that `data/megatron.py` describes; its index."""
    lengths = np.array([len(document) for document in documents], dtype="<i4")
    pointers = 2 * (np.cumsum(lengths, dtype="<i8") - lengths)
    index = HEADER.pack(MAGIC, 1, 8, len(documents), len(documents) + 1)
    index += lengths.tobytes() + pointers.astype("<i8").tobytes() + np.arange(len(documents) + 1, dtype="<i8").tobytes()
    prefix.with_suffix(".idx").write_bytes(index)
    with prefix.with_suffix(".bin").open("wb") as file:
        for document in documents:
            file.write(struct.pack(f"<{len(document)}H", *document))
    return prefix.with_suffix(".idx")


def _measured(stream: Stream, length: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of a stream: first of this process alone, then of a rank that trains at its share of the pace."""
    size = max(16384 // length, 1)

    def loader(workers: int) -> TrainingLoader:
        return build_loader(
            stream, sequence_length=length, micro_batch_size=size, samples_per_step=size, seed=0, workers=workers
        )

    begun = time.process_time()
    alone = loader(0)
    opening = time.process_time() - begun
    tokens = 0
    begun, until = time.process_time(), time.perf_counter() + arguments.seconds
    for (batch,) in alone:
        tokens += len(batch.tokens)
        if time.perf_counter() > until:
            break
    a_core = tokens / max(time.process_time() - begun, 1e-9)
    seconds = size * length * arguments.ranks / arguments.pace
    meter = Meter(total_steps=1)
    steps = meter.waiting(loader(arguments.workers))
    next(steps)  # processes have started then
    meter.read()
    until = time.perf_counter() + arguments.seconds
    for _ in steps:
        time.sleep(seconds)
        meter.add(size * length)
        if time.perf_counter() > until:
            break
    reading = meter.read()
    return {
        "tokens/s a core": a_core,
        "cores a node": arguments.pace / a_core,
        "share of a step waiting": reading.data_wait / reading.seconds_per_step,
        "keeps up": "yes" if a_core > arguments.pace / arguments.ranks else "no",
        "opening, s": opening,
        **alone.packed.figures(),
    }
