"""The command: `python -m torchlinearmoe.convert from-hf|to-hf SOURCE DESTINATION`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torchlinearmoe.commands import failures_on_one_line, progress_bar
from torchlinearmoe.errors import visible


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert weights; returns the exit status."""
    options = _parser().parse_args(arguments)
    with failures_on_one_line():
        return _from_hf(options) if options.direction == "from-hf" else _to_hf(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torchlinearmoe.convert",
        description="Weights of a Hugging Face directory into a checkpoint, or of a checkpoint into a directory.",
    )
    ways = parser.add_subparsers(dest="direction", required=True, metavar="from-hf|to-hf")
    into = ways.add_parser("from-hf", help="directory (config.json, safetensors) to checkpoint")
    into.add_argument("source", metavar="DIRECTORY", help="what `save_pretrained` wrote")
    into.add_argument("destination", metavar="CHECKPOINT", help="folder to make; usable by generate and init_from")
    out = ways.add_parser("to-hf", help="checkpoint to directory, for `AutoModelForCausalLM.from_pretrained`")
    out.add_argument("source", metavar="CHECKPOINT", help="e.g. runs/quickstart, or .../checkpoints/step-500")
    out.add_argument("destination", metavar="DIRECTORY", help="folder to make")
    out.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the weights (default: the checkpoint's, float32 after training)",
    )
    out.add_argument(
        "--shard-size",
        type=_gigabytes,
        default=5.0,
        metavar="GB",
        help="largest weight file (default: %(default)s)",
    )
    return parser


def _gigabytes(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}, legal: numbers above 0, in GB")
    return size


def _from_hf(options: argparse.Namespace) -> int:
    from torchlinearmoe.checkpoint.huggingface.importing import import_directory

    with progress_bar("importing") as progress:
        recipe = import_directory(options.source, options.destination, progress)
    source, destination = visible(options.source), visible(options.destination)
    print(f"{destination}: {recipe.model.family}, {recipe.model.num_layers} layers; recipe beside the weights")
    if recipe.data.tokenizer:
        print(f'next: python -m torchlinearmoe.generate {destination} --prompt "In the beginning"')
    else:
        print(f"{source} holds no tokenizer: training from it needs data.tokenizer, generating is from Python")
    return 0


def _to_hf(options: argparse.Namespace) -> int:
    import torch

    from torchlinearmoe.checkpoint.huggingface.exporting import export_checkpoint
    from torchlinearmoe.checkpoint.model import find_checkpoint
    from torchlinearmoe.families import FAMILIES

    dtype = getattr(torch, options.dtype) if options.dtype else None
    with progress_bar("exporting") as progress:
        config = export_checkpoint(
            find_checkpoint(options.source),
            options.destination,
            dtype=dtype,
            shard_bytes=int(options.shard_size * 1e9),
            progress=progress,
        )
    trust = ", trust_remote_code=True" if "auto_map" in config else ""
    destination = visible(options.destination)
    name = config["architectures"][0]
    print(f"{destination}: {name}")
    if any(name == each.name and each.own_code for family in FAMILIES.values() for each in family.published):
        print("next: transformers knows it by the release's own code, which belongs beside it")
        return 0
    print(f'next: AutoModelForCausalLM.from_pretrained("{destination}"{trust})')
    return 0


if __name__ == "__main__":
    sys.exit(main())
