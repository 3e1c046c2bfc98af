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
    from torchlinearmoe.data.tokenizer import Tokenizer
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
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        missing = error.name or "lm_eval"
        raise Failure(
            f"evaluate needs lm-eval ({missing} is not installed); pip install lm-eval, or the extra "
            "'torchlinearmoe[eval]'"
        ) from None
    from lm_eval.utils import handle_non_serializable, make_table  # pyright: ignore[reportMissingImports]

    if options.samples and not options.output:
        raise Failure("--samples: they go into the file that --output names; add it")
    with _ranks(), _model(options) as model:
        # Errors by resampling: tasks start processes for it, which a rank that holds a GPU must not.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        manager, tasks = _tasks(options, model.ids)
        simple_evaluate: Any = lm_eval.simple_evaluate  # its decorator hides what it takes
        results = simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=options.num_fewshot,
            limit=int(options.limit) if options.limit and options.limit >= 1 else options.limit,
            gen_kwargs=options.gen_kwargs,
            bootstrap_iters=1000,
            log_samples=options.samples,
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


def _tasks(options: argparse.Namespace, tokenizer: Tokenizer) -> tuple[Any, list[Any]]:
    """lm-eval's index of tasks, and the wanted ones: names and files as it takes them, our own made."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    from torchlinearmoe.errors import nearest
    from torchlinearmoe.harness.local import LOCAL, local_task

    folder = options.include_path
    if folder is not None and not Path(folder).is_dir():
        raise Failure(f"--include-path {folder}: no such folder")
    names: list[str] = list(dict.fromkeys(filter(None, map(str.strip, options.tasks.split(",")))))
    if not names:
        raise Failure("--tasks: names none; give local, or names of lm-eval's tasks")
    names = list(dict.fromkeys(each for name in names for each in (LOCAL if name == "local" else [name])))
    others = [name for name in names if name not in LOCAL]
    manager = TaskManager(include_path=folder, include_defaults=bool(others))  # thousands of files are read for it
    for name in others:
        if name not in manager.task_index and not Path(name).is_file():
            close, _, _ = nearest(name, ["local", *LOCAL, *manager.task_index]).partition("legal: ")
            told = close.strip() or "python -m lm_eval ls tasks lists lm-eval's"
            raise Failure(f"--tasks {name}: no such task, and no file of one; {told}")
    return manager, [local_task(name, tokenizer) if name in LOCAL else name for name in names]


if __name__ == "__main__":
    sys.exit(main())
