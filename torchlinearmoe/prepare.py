"""The command: `python -m torchlinearmoe.prepare INPUT... --output DIR`: text, JSONL and parquet to token shards."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torchlinearmoe.commands import Failure, bytes_bar, failures_on_one_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Tokenise files; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m torchlinearmoe.prepare",
        description="Tokenise text, JSONL and parquet, also as .gz, .zst or .bz2, into a folder that data.paths can "
        "name. Stopped at any moment, it goes on when it is started again.",
    )
    parser.add_argument("input", nargs="+", help="files, folders, or globs in quotes")
    parser.add_argument("--output", required=True, type=Path, help="the folder to write")
    parser.add_argument("--tokenizer", default="", help="tiktoken file or tokenizer.json; default: the one that ships")
    parser.add_argument("--text-key", default="text", help="where JSON and parquet have the text; a.b for a nested one")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: all cores)")
    parser.add_argument(
        "--bad-lines",
        choices=("fail", "skip"),
        default="fail",
        help="lines without a text: stop at the first (default), or pass over them and list them in bad_lines.jsonl",
    )
    parser.add_argument(
        "--begin-of-text",
        action=argparse.BooleanOptionalAction,
        help="whether documents start with the tokenizer's begin-of-text token (default: where it has one)",
    )
    parser.add_argument("--shard-tokens", type=int, default=1 << 27, help="tokens after which a shard ends (2^27)")
    parser.add_argument("--verify", action="store_true", help="compare finished shards with their checksums first")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    options = parser.parse_args(arguments)
    with failures_on_one_line():
        return _prepare(options)


def _prepare(options: argparse.Namespace) -> int:
    from torchlinearmoe.data.prepare import Options, check, make_again, prepare
    from torchlinearmoe.data.prepared import BAD_LINES, is_complete
    from torchlinearmoe.data.records import BadLine
    from torchlinearmoe.data.sources import find_sources
    from torchlinearmoe.data.tokenizer import load_tokenizer
    from torchlinearmoe.disk import expanded

    for name in ("workers", "shard_tokens"):
        if getattr(options, name) < (name != "workers"):
            raise Failure(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    output = expanded(options.output, "--output")
    tokenizer = load_tokenizer(options.tokenizer).starting(options.begin_of_text)
    found = find_sources(options.input, output, "INPUT")
    if found.stores:
        raise Failure(f"INPUT: '{found.stores[0]}' holds tokens already; name it in data.paths, or take it away")
    if options.verify and is_complete(output) and (damaged := check(output)):
        print(f"damaged, made again: {', '.join(shard.name for shard in damaged)}", file=sys.stderr)
        make_again(output, damaged)
    size, begun = sum(file.stat().st_size for file in found.files), time.monotonic()
    with bytes_bar("tokenising") as tell:
        try:
            summary = prepare(
                found.files,
                tokenizer,
                output,
                Options(options.text_key, options.bad_lines, options.shard_tokens),
                workers=options.workers or len(os.sched_getaffinity(0)),
                tell=tell,
            )
        except BadLine as error:
            raise Failure(f"{error}; mend it, or pass over such lines with --bad-lines=skip") from None
    seconds = time.monotonic() - begun
    if options.json:
        print(json.dumps(summary.described()))
        return 0
    print("\n".join(summary.table()))
    if summary.bad_lines:
        print(f"bad lines: {output / BAD_LINES}")
    print(f"{len(found.files)} files of {size / 1e6:.1f} MB in {seconds:.1f} s; in {output}")
    print(f"next: --data.paths='[\"{output}\"]'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
