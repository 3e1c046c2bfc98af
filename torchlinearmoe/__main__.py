"""The commands by one name: `torchlinearmoe [COMMAND]`, or `python -m torchlinearmoe [COMMAND]`; alone, their list."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from torchlinearmoe.commands import Failure, failures_on_one_line
from torchlinearmoe.errors import nearest

COMMANDS = {
    "train": ("train", "trains a recipe; over several ranks by torchrun -m torchlinearmoe.train"),
    "prepare": ("prepare", "text, JSONL, parquet to token shards, by many processes"),
    "plan": ("plan", "what a recipe costs on any number of ranks, without training"),
    "generate": ("generate", "continues a prompt with the model of a run or checkpoint"),
    "convert": ("convert", "Hugging Face weights in and out"),
    "evaluate": ("evaluate", "asks a model lm-eval's tasks, or questions made from the text that ships"),
    "recall": ("recall.__main__", "associative recall against the size of the state, a sweep over mixers"),
    "curves": ("curves.__main__", "learning curves of every mixer on real text, in the same trunk"),
    "plot": ("plot", "curves of runs as pictures"),
    "train-tokenizer": ("data.train_tokenizer", "a byte-pair encoding of one's own text"),
    "benchmark": ("benchmark.__main__", "what this machine does"),
    "keys": ("keys", "every recipe key with its default and legal values; mixers, families, sizes"),
}
"""Name to module, and what it does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, or list them; returns the exit status."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: torchlinearmoe COMMAND [--help | its options]\n")
        width = max(map(len, COMMANDS))
        for command, (_, does) in COMMANDS.items():
            print(f"  {command:{width}}  {does}")
        return 0
    with failures_on_one_line():
        if name not in COMMANDS:
            raise Failure(f"{name}: no such command; {nearest(name, COMMANDS)}")
    return import_module(f"torchlinearmoe.{COMMANDS[name][0]}").main(rest)


if __name__ == "__main__":
    sys.exit(main())
