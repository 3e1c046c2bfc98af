"""What `--quick` does first: the runs of all sections in as few processes as there can be, beside each other.

    one rank    losses .......... first step | waits ........ | timed, resumed |
    all ranks   losses, saved, resumed .... first step | waits ............... | timed, timed, ...
    kill        trains, killed, trains on .......... |

A start of Python, CUDA and NCCL takes longer than most runs, and what is compared does not mind company. What is timed
does: it builds and compiles beside the others, then waits until they have ended. Sections ask for the same runs later,
and find them known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import ModuleType
from typing import Any

from torchlinearmoe.benchmark.multi.host import Host, Run, Runs, key_of

TIMED = ("speed", "overlap")
"""Kinds of runs that take place alone."""
TIMED_FIRST = "context"
"""The section whose speeds are worth most."""
TIMED_SECONDS = 45
"""Of the time of all, kept for what is timed: so long before its end nothing waits for a killed rank any more."""
PATIENCE = 60
"""Of a run; kernels compile meanwhile."""


def measure_together(host: Host, modules: Mapping[str, ModuleType], over: float) -> None:
    """Measure what the sections will ask for, until `over`, equality first; what had no time stays unknown."""
    one, every, apart = _wanted(host, modules)
    one_ends, every_checked = host.turns / "one-ends", host.turns / "every-checked"
    apart_ends = {name: host.turns / f"{name}-ends" for name in apart}
    quiet = [str(path) for path in apart_ends.values()]
    # One rank's `train` goes on from what all have saved.
    for run in one:
        if run["kind"] in (*TIMED, "train"):
            run["after"] = [str(every_checked), *(quiet if run["kind"] in TIMED else [])]
    for run in every:
        if run["kind"] in TIMED:
            run |= {"says": str(every_checked), "after": [str(one_ends), *quiet]}
    host.deadline, host.patience = over, PATIENCE
    tasks: list[tuple[Path, Callable[[], Any]]] = [
        (one_ends, lambda: host.measure(one, 1)),
        (every_checked, lambda: host.measure(every)),
        *(
            (apart_ends[name], lambda name=name, find=find: host.once(name, find, over - TIMED_SECONDS))
            for name, find in apart.items()
        ),
    ]
    with ThreadPoolExecutor(len(tasks)) as pool:
        futures = [pool.submit(_and_say, path, task) for path, task in tasks]
        with host.ending():
            wait(futures)  # what one raised, its section will meet again and tell
    host.patience = float("inf")
    host.uncounted = set(host.known)


def _wanted(host: Host, modules: Mapping[str, ModuleType]) -> tuple[list[Run], list[Run], dict[str, Any]]:
    """Runs of one rank and of all, each once and in the order of their worth; and what takes processes of its own."""
    wanted: dict[str, Runs] = {}
    for name, module in modules.items():
        try:
            wanted[name] = module.runs(host)
        except Exception:  # noqa: S112  # the section will raise it again, and tell
            continue
    one = _ordered(host, 1, {name: runs.one for name, runs in wanted.items()})
    every = _ordered(host, host.ranks, {name: runs.every for name, runs in wanted.items()})
    return one, every, {name: runs.apart for name, runs in wanted.items() if runs.apart is not None}


def _ordered(host: Host, ranks: int, wanted: dict[str, list[Run]]) -> list[Run]:
    first = {name: runs for name, runs in wanted.items() if name == TIMED_FIRST}
    checks = [run for runs in wanted.values() for run in runs if run["kind"] not in TIMED]
    times = [run for runs in (first | wanted).values() for run in runs if run["kind"] in TIMED]
    if ranks == 1:  # what it resumes waits for the others, what it times is built by then
        checks, last = [run for run in checks if run["kind"] != "train"], [r for r in checks if r["kind"] == "train"]
        times += last
    return list({key_of(run, ranks): dict(run) for run in [*checks, *times]}.values())


def _and_say(path: Path, task: Callable[[], Any]) -> Any:
    try:
        return task()
    finally:
        path.touch()
