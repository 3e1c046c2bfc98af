"""`benchmark multi`: every kind of parallelism on the GPUs of one host, checked and timed.

Each section starts torchruns of its own on all the GPUs and has a limit of time: one that fails, hangs or kills its
ranks is a row of the table, and the others go on. Started by torchrun itself, the first rank does all that with as many
ranks as there are, and the others leave. Without GPUs everything runs on CPU ranks at debug sizes. `--quick` measures
all sections together, equality before speed, with smaller models; what it has no time for is left out.

    host.py, job.py      torchrun on some ranks until a deadline; what its ranks do
    together.py          the runs of all sections in three torchruns beside each other, for `--quick`
    models.py, shapes.py what is trained, and how much at a time
    rows.py, overlap.py  what counts as equal; what of a gather counts as hidden
    the rest             a section each
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch
from rich.console import Console
from torch.cuda import nccl

from torchlinearmoe.benchmark.contest import cell, show
from torchlinearmoe.benchmark.multi import checkpoint, context, expert, fsdp, kill, pipeline, tensor
from torchlinearmoe.benchmark.multi.host import LATE, Host, OutOfTime
from torchlinearmoe.benchmark.multi.models import about, check_overrides, timed
from torchlinearmoe.benchmark.multi.rows import Row, failed, left_out
from torchlinearmoe.benchmark.multi.together import measure_together
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.recipe import resolve
from torchlinearmoe.recipe.parse import parse_overrides
from torchlinearmoe.runtime import world_size

SECTIONS: dict[str, ModuleType] = {
    "fsdp": fsdp,
    "context": context,
    "expert": expert,
    "tensor": tensor,
    "pipeline": pipeline,
    "checkpoint": checkpoint,
    "kill": kill,
}
"""In the order of their value, which is that of `--quick`."""
OPENING = ("section", "case", "result")
"""Columns with which a line begins."""
RANKS = (2, 4, 8)
QUICK_SECONDS = 115
"""Of all sections together."""
COLUMNS = {
    "section": "section",
    "case": "case",
    "result": "result",
    "loss_difference": "losses differ",
    "gradient_difference": "gradients differ",
    "max_load": "max load",
    "tokens_per_second_per_gpu": "tokens/s a GPU",
    "share": "share",
    "of": "of",
    "hidden_share": "hidden",
    "gather_ms": "gather ms",
    "tokens": "tokens",
    "memory_gib": "GiB",
    "note": "note",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    parser.add_argument("--quick", action="store_true", help="smaller models, fewer cases, none compiled, two minutes")
    parser.add_argument(
        "--only", nargs="+", choices=list(SECTIONS), metavar="NAME", help=f"of {', '.join(SECTIONS)}; in that order"
    )
    parser.add_argument("--ranks", type=int, choices=RANKS, help="ranks (default: torchrun's, else all GPUs, else 2)")
    parser.add_argument(
        "--device", choices=["auto", "cuda", "cpu"], default="auto", help="auto takes GPUs where there are two"
    )
    parser.add_argument("--eager", action="store_true", help="compile only what `context` times both ways")
    parser.add_argument("--limit", type=float, help="seconds a section (default: each its own)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write header and rows, after every row")
    parser.add_argument("--folder", type=Path, help="where runs and logs are kept (default: nowhere)")


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run the sections and print their table; 1 when something failed."""
    launched = world_size()
    if int(os.environ.get("LOCAL_WORLD_SIZE", launched)) != launched:
        raise RecipeError("benchmark multi: runs on one host; start it with torchrun --nnodes=1, or without torchrun")
    if os.environ.get("RANK", "0") != "0":
        return 0
    signal.signal(signal.SIGTERM, _leave)
    ranks, cuda = _choose(arguments, launched)
    given = parse_overrides(overrides)
    check_overrides(given)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = (arguments.folder or Path(temporary)).absolute()
        if arguments.folder and folder.exists() and any(folder.iterdir()):
            raise RecipeError(f"--folder {arguments.folder}: is not empty; name another one")
        folder.mkdir(parents=True, exist_ok=True)
        compiled = cuda and not arguments.quick and not arguments.eager
        host = Host(ranks, cuda, arguments.quick, compiled, folder, given)
        resolve(timed(host, length=64, sequences=1, parallel={"data_shard": 1}))  # refuses keys that are wrong
        return _report(host, arguments)


def _report(host: Host, arguments: argparse.Namespace) -> int:
    rows: list[Row] = []
    over = time.monotonic() + (QUICK_SECONDS if host.quick else float("inf"))
    names = list(dict.fromkeys(arguments.only or SECTIONS))

    def found(name: str, row: Row | None = None) -> None:
        """Tell of a row as it comes: a call that is cut short keeps its rows."""
        if row is not None:
            print(_line(name, row), flush=True)
        if arguments.json:
            shown = [*rows, *([] if row is None else [{"section": name, **row}])]
            written = {"header": header(host), "rows": shown, "start_s": host.start_s, "torchruns": host.torchruns}
            arguments.json.write_text(json.dumps(written, indent=1) + "\n")

    with Console(stderr=True).status("") as status:
        if host.quick:
            status.update("all sections together")
            measure_together(host, {name: SECTIONS[name] for name in names}, over)
        for number, name in enumerate(names, 1):
            status.update(f"{name} ({number} of {len(names)})")
            for row in section(host, name, arguments.limit, over, None if host.quick else partial(found, name)):
                rows.append({"section": name, **row})
                if row["result"] == "failed":
                    print(f"{name}, {row['case']}: {row['error']}", file=sys.stderr, flush=True)
            found(name)
    title = ", ".join(f"{key} {value}" for key, value in header(host).items() if value)
    shown = {key: name for key, name in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    show(title, [{name: row.get(key) for key, name in shown.items()} for row in rows])
    return 1 if any(row["result"] == "failed" for row in rows) else 0


def section(
    host: Host, name: str, limit: float | None, over: float, found: Callable[[Row], None] | None = None
) -> list[Row]:
    """The rows of a section, whatever becomes of it; `over`: when the time of all of them is, in time.monotonic().

    `found` is told of each as it comes.
    """
    now, asked_s = time.monotonic(), host.asked_s
    module = SECTIONS[name]
    host.deadline = min(now + (limit or module.LIMIT), over)
    rows: list[Row] = []
    try:
        for row in module.run(host):
            rows.append(row)
            if found is not None:
                found(row)
    except OutOfTime:
        rows.append(failed("all", f"no answer {LATE}"))
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        rows.append(failed("all", f"{type(error).__name__}: {said}"))
    if host.deadline == over:  # not a section's own limit: what it did not come to is no failure
        late = [row.get("error", "").endswith(LATE) for row in rows]
        rows = [left_out(row["case"], "the time of --quick is over") if cut else row for row, cut in zip(rows, late)]
    seconds = round(time.monotonic() - now + host.asked_s - asked_s, 1)
    return [row | {"seconds": seconds} if row is rows[-1] else row for row in rows]


def _line(name: str, row: Row) -> str:
    """A row in one line."""
    cells = [f"{label} {cell(row[key])}" for key, label in COLUMNS.items() if key not in OPENING and key in row]
    return f"{name}, {row['case']}: {', '.join([row['result'], *cells])}"


def header(host: Host) -> dict[str, Any]:
    """Where the figures are from."""
    version = nccl.version() if host.cuda else None
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return {
        "ranks": host.ranks,
        "chip": host.chip,
        "backend": "nccl" if host.cuda else "gloo",
        "torch": torch.__version__,
        "triton": triton,
        "nccl": ".".join(map(str, version)) if version else None,
        "python": platform.python_version(),
        "compiled": host.compiled,
        "quick": host.quick,
        "models": about(host) if host.quick else None,
        "seconds": round(time.monotonic() - host.began, 1),
    }


def _choose(arguments: argparse.Namespace, launched: int) -> tuple[int, bool]:
    """Ranks, and whether they are GPUs."""
    gpus = torch.cuda.device_count()
    if arguments.device == "cuda" and gpus < 2:
        raise RecipeError(f"--device cuda: {gpus} GPUs are visible, it takes 2; --device cpu runs debug sizes")
    cuda = arguments.device == "cuda" or (arguments.device == "auto" and gpus >= 2)
    most = max(ranks for ranks in RANKS if ranks <= gpus) if cuda else 2
    ranks = arguments.ranks or (launched if launched > 1 else most)
    if launched > 1 and ranks != launched:
        raise RecipeError(f"--ranks {ranks}: torchrun started {launched}; leave it out")
    if ranks not in RANKS:
        raise RecipeError(f"benchmark multi: {ranks} ranks; legal: {', '.join(map(str, RANKS))}")
    if cuda and ranks > gpus:
        raise RecipeError(f"--ranks {ranks}: {gpus} GPUs are visible; --device cpu runs debug sizes")
    return ranks, cuda


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
