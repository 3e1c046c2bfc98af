"""The command: `python -m torchlinearmoe.prepare INPUT... --output DIR`: text, JSONL and parquet to token shards."""

from __future__ import annotations

import argparse
import json
import os
import shlex
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
    parser.add_argument("--format", choices=("text", "messages"), default="text", help="as data.format (text)")
    parser.add_argument("--chat-template", default="", metavar="T", help="of messages, as data.chat_template (chatml)")
    parser.add_argument(
        "--trained-roles",
        default="",
        metavar="ROLES",
        help="of messages, with commas; as data.trained_roles (assistant)",
    )
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
    from torchlinearmoe.data.chat import Chat
    from torchlinearmoe.data.chat_template import load_template
    from torchlinearmoe.data.messages import ASSISTANT
    from torchlinearmoe.data.prepare import Options, check, make_again, prepare
    from torchlinearmoe.data.prepared import BAD_LINES, is_complete
    from torchlinearmoe.data.records import BadLine
    from torchlinearmoe.data.sources import find_messages, find_sources
    from torchlinearmoe.data.tokenizer import load_tokenizer
    from torchlinearmoe.disk import expanded

    for name in ("workers", "shard_tokens"):
        if getattr(options, name) < (name != "workers"):
            raise Failure(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    messages = options.format == "messages"
    for name in ("chat_template", "trained_roles") if not messages else ():
        if getattr(options, name):
            raise Failure(f"--{name.replace('_', '-')}: only messages are written so; add --format=messages")
    if messages and options.text_key != "text":
        raise Failure(f"--text-key {options.text_key}: messages have no text; leave it out")
    roles = tuple(dict.fromkeys(filter(None, options.trained_roles.split(",")))) or ASSISTANT
    output = expanded(options.output, "--output")
    tokenizer = load_tokenizer(options.tokenizer).starting(options.begin_of_text)
    template = load_template(options.chat_template or "chatml", tokenizer) if messages else None
    found = (find_messages if messages else find_sources)(options.input, output, "INPUT")
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
                Options(
                    options.text_key,
                    options.bad_lines,
                    None if template is None else Chat(template, roles),
                    options.shard_tokens,
                ),
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
    told = [f"--data.paths='[\"{output}\"]'"]
    if messages:
        told.append(f"--data.format=messages --data.chat_template={shlex.quote(options.chat_template or 'chatml')}")
    if roles != ASSISTANT:
        told.append(f"--data.trained_roles='{json.dumps(roles)}'")
    print(f"next: {' '.join(told)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
