"""From files of every kind to a trained mixture, killed on the way and begun again: as if nothing had happened.

The size of the corpus is CORPUS_MB (default 6) of text; of 200 MB, with its figures:

    CORPUS_MB=200 pytest -n0 -s -m slow tests/distributed/test_corpus_to_training.py
"""

import gzip
import json
import os
import random
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, TRAIN, job, steps_logged

from torchlinearmoe.checkpoint import find_latest
from torchlinearmoe.data.fingerprint import fingerprint
from torchlinearmoe.data.loader import build_loader
from torchlinearmoe.data.open import open_data
from torchlinearmoe.data.prepared import is_complete
from torchlinearmoe.data.sources import find_sources, read_documents
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.recipe import load_recipe

MEGABYTES = float(os.environ.get("CORPUS_MB", "6"))
FILES = max(6, round(MEGABYTES / 10))
STEPS = 8
MEASURED = """
import resource, sys
from torchlinearmoe.prepare import main
status = main(sys.argv[1:])
both = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
print(max(resource.getrusage(who).ru_maxrss for who in both), file=sys.stderr)
sys.exit(status)
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def write_corpus(folder: Path) -> int:
    """Chapters with their sentences in random order, as gzipped JSONL, parquet and text by turns; bytes of text."""
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    chapters = [re.split(r"(?<=[.?!]) +", text) for text in read_documents(find_sources().files)]
    drawn, written = random.Random(0), 0
    folder.mkdir()
    for number in range(FILES):
        texts, size = [], 0
        while size < MEGABYTES * 1e6 / FILES:
            sentences = drawn.choice(chapters)
            texts.append(" ".join(drawn.sample(sentences, len(sentences))))
            size += len(texts[-1].encode())
        written += size
        lines = "".join(json.dumps({"content": {"text": text}}) + "\n" for text in texts)
        if number % 3 == 0:
            (folder / f"{number:03}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 1))
        elif number % 3 == 1:
            table = pyarrow.Table.from_pylist([{"content": {"text": text}} for text in texts])
            parquet.write_table(table, folder / f"{number:03}.parquet", row_group_size=200)
        else:
            (folder / f"{number:03}.txt").write_text("<|endoftext|>".join(texts))
    return written


def write_megatron(path: Path) -> None:
    """The chapters that ship as Megatron leaves them with `--append-eod`."""
    tokenizer = load_tokenizer()
    documents = [[*tokenizer.encode(text), tokenizer.end_of_text] for text in read_documents(find_sources().files)]
    lengths = np.array([len(document) for document in documents], dtype="<i4")
    places = np.concatenate([[0], np.cumsum(lengths)])[:-1].astype("<i8") * 2
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(documents), len(documents) + 1)
    index = header + lengths.tobytes() + places.tobytes() + np.arange(len(documents) + 1, dtype="<i8").tobytes()
    path.with_suffix(".idx").write_bytes(index)
    path.with_suffix(".bin").write_bytes(np.concatenate(documents).astype("<u2").tobytes())


def arguments(corpus: Path, output: Path) -> list[str]:
    tokens = max(100_000, int(MEGABYTES * 1e6) // 40)
    told = ["--text-key", "content.text", "--shard-tokens", tokens, "--workers", 2, "--json"]
    return [str(word) for word in (corpus, "--output", output, *told)]


def prepared(corpus: Path, output: Path) -> tuple[dict, int, float]:
    """The summary, peak memory of a process in KiB, and seconds."""
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments(corpus, output)], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), int(done.stderr.split()[-1]), time.monotonic() - begun


def content(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def batches(recipe: Path) -> list[list[list[int]]]:
    """The rows of every step, and what the data are known by."""
    data, training = load_recipe(recipe).data, load_recipe(recipe).training
    splits = open_data(data, load_tokenizer(), recipe.parent / "cache")
    loader = build_loader(
        splits.train,
        sequence_length=training.sequence_length,
        micro_batch_size=training.micro_batch_size,
        samples_per_step=4,
        seed=training.seed,
        stop_step=STEPS,
    )
    rows = [[batch.tokens.tolist() for batch in step] for step in loader]
    assert len(rows) == STEPS
    return [*rows, [[hash(fingerprint(splits.stores))]]]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_corpus_is_prepared_and_trained_on_with_kills_as_without(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    size = write_corpus(corpus)
    write_megatron(tmp_path / "megatron")
    part = tmp_path / "part"
    part.mkdir()
    for file in sorted(corpus.iterdir())[:3]:
        (part / file.name).symlink_to(file)

    _, small_peak, _ = prepared(part, tmp_path / "part-tokens")
    summary, peak, seconds = prepared(corpus, tmp_path / "undisturbed")
    assert summary["bytes"] >= 0.99 * size and summary["documents"] > 40
    print(f"\n{size / 1e6:.0f} MB of text in {seconds:.1f} s by 2 processes: {size / 1e6 / seconds:.2f} MB/s")
    print(
        f"peak memory of a process: {small_peak / 1024:.0f} MiB of {3 / FILES:.0%} of it, {peak / 1024:.0f} MiB of all"
    )
    assert peak < small_peak + 100_000

    killed = tmp_path / "killed"
    with job(tmp_path / "prepare.log", "-m", "torchlinearmoe.prepare", *arguments(corpus, killed)) as command:
        command.wait_for(lambda: bool(list(killed.glob("shards/0*/shard.json"))), 600)
        command.kill()
    assert not is_complete(killed)
    kept = {path: path.stat().st_mtime_ns for path in killed.glob("shards/0*/shard.json")}
    again, *_ = prepared(corpus, killed)
    assert again == summary and all(path.stat().st_mtime_ns == time for path, time in kept.items())
    wanted = content(tmp_path / "undisturbed")
    assert content(killed) == wanted

    recipes = []
    for name in ("undisturbed", "killed"):
        sources = f'[{{path="{tmp_path / name}", weight=3}}, {{path="{tmp_path / "megatron.idx"}", weight=1}}]'
        told = {
            "data.sources": sources,
            "data.workers": 1,
            "data.validation_fraction": 0,
            "training.steps": STEPS,
            "training.micro_batch_size": 2,
            "training.tokens_per_step": 1024,
            "training.output_dir": tmp_path / f"run-{name}",
            "training.device": "cpu",
            "metrics.interval": 1,
            "metrics.tensorboard": "false",
            "checkpoint.interval": 2,
        }
        recipes.append(
            [str(ROOT / "recipes" / "quickstart.toml"), *(f"--{key}={value}" for key, value in told.items())]
        )
    begun = time.monotonic()
    with job(tmp_path / "whole.log", *TRAIN, *recipes[0]) as command:
        assert command.status(600) == 0, command.log.read_text()
    print(f"{STEPS} steps of an undisturbed run in {time.monotonic() - begun:.1f} s")
    run = tmp_path / "run-killed"
    with job(tmp_path / "first.log", *TRAIN, *recipes[1]) as command:
        command.wait_for(lambda: steps_logged(run) >= 4 and find_latest(run / "checkpoints") is not None, 600)
        command.kill()
    assert steps_logged(run) < STEPS
    with job(tmp_path / "second.log", *TRAIN, *recipes[1]) as command:
        assert command.status(600) == 0, command.log.read_text()

    runs = [tmp_path / f"run-{name}" for name in ("undisturbed", "killed")]
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    for key in ("step", "loss", "grad_norm", "tokens"):
        assert [line[key] for line in lines[0]] == [line[key] for line in lines[1]], key
    shares = {key: value for key, value in lines[1][-1].items() if key.startswith("data/share/")}
    assert sorted(shares.values()) == [0.25, 0.75] and len(lines[0]) == STEPS
    assert batches(runs[0] / "recipe.toml") == batches(runs[1] / "recipe.toml")
