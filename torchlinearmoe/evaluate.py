"""The command: `python -m torchlinearmoe.evaluate CHECKPOINT --tasks ...`: lm-eval's tasks, or those made here."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchlinearmoe.commands import Failure, add_device_options, device_and_dtype, failures_on_one_line

if TYPE_CHECKING:
    from torchlinearmoe.harness.lm import LinearMoELM


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate, print lm-eval's table and write its results; returns the exit status."""
    options = _parser().parse_args(arguments)
    with failures_on_one_line():
        return _evaluate(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torchlinearmoe.evaluate",
        description="Ask a model the tasks of lm-eval (extra `eval`), by its own simple_evaluate. `--tasks local` "
        "needs no network: questions made from the text that ships. torchrun spreads the questions over ranks, each of "
        "which has the whole model.",
    )
    add = parser.add_argument
    add("checkpoint", help="folder of a checkpoint, of a run for its newest one, or a Hugging Face directory")
    add(
        "--tasks",
        required=True,
        metavar="NAMES",
        help="names of lm-eval's tasks or groups, with commas between; files of task YAML; local, or one of "
        "local_text, local_next_verse, local_last_word",
    )
    add("--num-fewshot", type=int, metavar="N", help="examples before each question (default: as the task says)")
    add("--limit", type=float, metavar="N", help="questions of each task at most; below 1 their share")
    add("--batch-tokens", type=int, default=8192, metavar="N", help="tokens that are read at once (default 8192)")
    add("--max-length", type=int, metavar="N", help="longest text read, in tokens (default: model.max_length)")
    add("--gen-kwargs", metavar="KEY=VALUE,...", help="of generation, over what tasks say: max_gen_toks=64")
    add("--include-path", metavar="FOLDER", help="folder of more task YAML, whose tasks may then be named")
    add("--output", metavar="FILE", help="results as JSON; default: nothing is written")
    add("--samples", action="store_true", help="with --output, every question and answer too")
    add_device_options(parser)
    return parser


def _evaluate(options: argparse.Namespace) -> int:
    from torchlinearmoe.harness.asking import ask, check_lm_eval
    from torchlinearmoe.harness.tasks import Tasks

    check_lm_eval("evaluate")
    from lm_eval.utils import handle_non_serializable, make_table  # pyright: ignore[reportMissingImports]

    if options.samples and not options.output:
        raise Failure("--samples: they go into the file that --output names; add it")
    with _ranks(), _model(options) as model:
        tasks = Tasks(options.tasks.split(","), model.ids, "--tasks", options.include_path)
        results = ask(
            model,
            tasks,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            gen_kwargs=options.gen_kwargs,
            resamplings=1000,
            samples=options.samples,
        )
        if results is None:
            return 0  # another rank than the first
        if options.output:
            file = Path(options.output)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n")
        print(make_table(results))
        if results.get("groups"):
            print(make_table(results, "groups"))
        if options.output:
            print(options.output)
    return 0


def _ranks() -> Any:
    """A process group where torchrun started several ranks."""
    from torchlinearmoe.runtime import process_group, world_size

    if world_size() == 1:
        return nullcontext()
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return process_group(torch.device("cuda"))
    return process_group(torch.device("cpu"))


@contextmanager
def _model(options: argparse.Namespace) -> Iterator[LinearMoELM]:
    """The model and tokenizer at a path of any kind, cast and ready."""
    import torch

    from torchlinearmoe.checkpoint.huggingface.directory import is_directory
    from torchlinearmoe.checkpoint.huggingface.importing import import_directory
    from torchlinearmoe.checkpoint.model import checkpoint_tokenizer, ends_of_text, find_checkpoint, load_model
    from torchlinearmoe.generation import cast_weights
    from torchlinearmoe.harness.lm import LinearMoELM

    device, dtype = device_and_dtype(options)
    with tempfile.TemporaryDirectory(prefix="torchlinearmoe-") as folder:
        path = find_checkpoint(options.checkpoint)
        if is_directory(path):
            import_directory(path, Path(folder) / "imported")
            path = Path(folder) / "imported"
        with torch.device(device):
            model = load_model(path)
        tokenizer = checkpoint_tokenizer(path)
        ends = sorted(ends_of_text(path, tokenizer))
    cast_weights(model, dtype)
    yield LinearMoELM(
        model,
        tokenizer,
        ends=ends,
        batch_tokens=options.batch_tokens,
        max_length=options.max_length,
        name=str(options.checkpoint),
    )


if __name__ == "__main__":
    sys.exit(main())
