"""Contestant: a tokenizer's library alone, one thread, texts that are in memory."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from torchlinearmoe.benchmark.contest import answer

os.environ["RAYON_NUM_THREADS"] = "1"  # before `tokenizers` is imported


def measure(options: dict[str, str]) -> dict[str, float]:
    """Seconds for the texts of `options`: tokenizer, file."""
    from torchlinearmoe.data.store import BATCH_CHARACTERS

    with Path(options["file"]).open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    batches: list[list[str]] = [[]]
    characters = 0
    for text in texts:
        if characters >= BATCH_CHARACTERS:
            batches.append([])
            characters = 0
        batches[-1].append(text)
        characters += len(text)
    path = options["tokenizer"]
    if path.endswith(".json"):
        from tokenizers import Tokenizer

        model = Tokenizer.from_file(path)

        def encode(batch: list[str]) -> list[list[int]]:
            return [encoded.ids for encoded in model.encode_batch_fast(batch, add_special_tokens=False)]
    else:
        from torchlinearmoe.data.tokenizer.tiktoken import TiktokenTokenizer

        encoding = TiktokenTokenizer(Path(path)).encoding

        def encode(batch: list[str]) -> list[list[int]]:
            return encoding.encode_ordinary_batch(batch, num_threads=1)

    encode(batches[0][:1])
    begun, cpu = time.perf_counter(), time.process_time()
    for batch in batches:
        encode(batch)
    return {"wall_s": time.perf_counter() - begun, "cpu_s": time.process_time() - cpu}


if __name__ == "__main__":
    answer(measure(json.loads(sys.argv[1])))
