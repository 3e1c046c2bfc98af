"""The command: `python -m torchlinearmoe.recall`: associative recall against the size of the state, by mixer."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torchlinearmoe.commands import Failure, failures_on_one_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sweep, or what is left of it; returns the exit status."""
    parser = _parser()
    options, overrides = parser.parse_known_args(arguments)
    with failures_on_one_line():
        return _recall(options, overrides)


def _parser() -> argparse.ArgumentParser:
    from torchlinearmoe.recall.settings import SETTINGS

    parser = argparse.ArgumentParser(
        prog="python -m torchlinearmoe.recall",
        description="Train small models of several mixers, widths and learning rates on multi-query associative recall "
        "(arXiv 2312.04927), and draw accuracy against the bytes of the state. Started again, it skips what is done.",
        epilog="Recipe keys can be given as --section.key=value, for all models.",
    )
    add = parser.add_argument
    add("--setting", choices=list(SETTINGS), default="published", help="what is asked, and the defaults below")
    add(
        "--mixers",
        nargs="+",
        metavar="NAME[:OPTION=VALUE,...]",
        help="mixers, perhaps with options of theirs (mamba2:state=16); 'all' for every one there is",
    )
    add("--widths", nargs="+", type=int, metavar="D", help="widths of the models, which size their states")
    add("--lrs", nargs="+", type=float, metavar="LR", help="learning rates; the best one of each model counts")
    add("--steps", type=int, metavar="N", help="longest training of a model (default: the setting's)")
    add("--seconds", type=float, metavar="S", help="begin no model after so many seconds, nor one that would not end")
    add("--output", default="runs/recall", metavar="FOLDER", help="where recall.json and recall.png go (runs/recall)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU when there is one")
    add("--no-picture", action="store_true", help="write figures only; the picture needs matplotlib (extra `plot`)")
    return parser


def _recall(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    import torch

    from torchlinearmoe.commands import progress_bar
    from torchlinearmoe.mixers import MIXERS
    from torchlinearmoe.plotting.figures import check_matplotlib
    from torchlinearmoe.recall.cases import build_cases
    from torchlinearmoe.recall.learn import learn
    from torchlinearmoe.recall.results import FILE, add_result, best, read_results, table
    from torchlinearmoe.recall.settings import SETTINGS

    if options.device == "cuda" and not torch.cuda.is_available():
        raise Failure("--device cuda: no GPU is visible; use cpu or auto")
    cuda = options.device != "cpu" and torch.cuda.is_available()
    if not options.no_picture:
        check_matplotlib("recall", "; or --no-picture")
    setting = SETTINGS[options.setting]
    if options.steps is not None:
        overrides = [*overrides, f"training.steps={options.steps}"]
    mixers = [*MIXERS] if options.mixers == ["all"] else options.mixers or setting.mixers
    cases = build_cases(setting, mixers, options.widths or setting.widths, options.lrs or setting.lrs, overrides)
    folder = Path(options.output)
    known = read_results(folder)
    done = sum(case.key in known for case in cases)
    print(f"{len(cases)} models, {done} of them done before; in {folder}", flush=True)
    begun, longest = time.monotonic(), 0.0
    for number, case in enumerate(cases, start=1):
        if case.key in known:
            continue
        if options.seconds is not None and time.monotonic() - begun + longest > options.seconds:
            print(f"{sum(case.key not in known for case in cases)} models left: the time is over", flush=True)
            break
        name = f"[{number}/{len(cases)}] {case.label} width {case.width} lr {case.lr:.1e}"
        with progress_bar(name) as tell:
            outcome = learn(case, setting.tests, setting.enough, torch.device("cuda" if cuda else "cpu"), tell)
        longest = max(longest, outcome.seconds)
        known[case.key] = add_result(folder, options.setting, case, outcome)
        print(f"{name}: accuracy {outcome.accuracy:.3f}, {outcome.steps} steps ({outcome.ended}), "
              f"{outcome.state_bytes:,} bytes of state, {outcome.seconds:.0f} s", flush=True)  # fmt: skip
    lines = best(known[case.key] for case in cases if case.key in known)
    print("", *table(lines), "", folder / FILE, sep="\n")
    if lines and not options.no_picture:
        print(_draw(options.setting, lines, folder / "recall.png"))
    return 0


def _draw(setting: str, lines: Sequence[dict], file: Path) -> Path:
    from torchlinearmoe.plotting.tradeoff import Curve, draw_tradeoff
    from torchlinearmoe.recall.published import published

    curves: dict[str, Curve] = {}
    for line in lines:
        others = published(line["mixer"]) if setting == "published" else []
        curve = curves.setdefault(line["label"], Curve([], others))
        curve.points.append((line["state_bytes"], line["accuracy"]))
    draw_tradeoff(curves, file)
    return file


if __name__ == "__main__":
    sys.exit(main())
