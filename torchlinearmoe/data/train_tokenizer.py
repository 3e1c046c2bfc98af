"""Trains a byte-pair encoding and writes it as a tiktoken file.

python -m torchlinearmoe.data.train_tokenizer [TEXT ...] --output NAME.tiktoken [--vocab-size 1024]

Without TEXT it trains on the corpus that ships. All 256 bytes are tokens, so every text can be encoded; the last id,
`vocab_size - 1`, is kept for `<|endoftext|>` and has no line in the file. Text is cut by `tokenizer.DEFAULT_PATTERN`.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from torchlinearmoe.data.sources import find_sources, read_documents
from torchlinearmoe.data.tokenizer import DEFAULT_PATTERN
from torchlinearmoe.data.tokenizer.huggingface import byte_level_alphabet, import_tokenizers
from torchlinearmoe.errors import UserError


def train(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Ranks of a byte-pair encoding of `texts`: `vocab_size - 1` of them, fewer when the text runs out of pairs."""
    if vocab_size < 257:
        raise UserError(f"--vocab-size {vocab_size}: at least 257, the bytes and the end of text")
    tokenizers = import_tokenizers()
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(DEFAULT_PATTERN), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = byte_level_alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=list(alphabet), show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    vocabulary = json.loads(model.to_str())["model"]["vocab"]
    return {bytes(alphabet[letter] for letter in token): rank for token, rank in vocabulary.items()}


def save(ranks: dict[bytes, int], path: Path) -> None:
    """Writes `base64 rank` lines by rank, all or none. Raises UserError when `path` cannot be written."""
    lines = (
        f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in sorted(ranks.items(), key=lambda i: i[1])
    )
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text("".join(lines), encoding="ascii")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"--output {path}: cannot write there: {error.strerror}") from None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m torchlinearmoe.data.train_tokenizer",
        description="Train a byte-pair encoding and write it as a tiktoken file.",
    )
    parser.add_argument("text", nargs="*", help="files or folders of text; default: the corpus that ships")
    parser.add_argument("--output", required=True, type=Path, help="the .tiktoken file to write")
    parser.add_argument("--vocab-size", type=int, default=1024, help="ids, <|endoftext|> included (default 1024)")
    options = parser.parse_args(arguments)
    try:
        ranks = train(read_documents(find_sources(options.text).files), options.vocab_size)
        save(ranks, options.output)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {len(ranks)} tokens and <|endoftext|> = {max(ranks.values()) + 1}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
