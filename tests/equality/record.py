"""Records what ten steps of every mixer and family give, and compares with what was recorded.

    python tests/equality/record.py --check              compare; exit status 1 where a case differs
    python tests/equality/record.py --check --only gla   the cases whose name holds `gla`
    python tests/equality/record.py                      record

On the machine that recorded them figures are equal bit for bit; on any other losses to a relative 1e-5 and gradient
norms to 1e-4. A change that means to alter results records them anew, in the same commit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from equality_run import Figures, cases, machine, run

RECORDED = Path(__file__).with_name("recorded.json")
LIMITS = {"losses": 1e-5, "grad_norms": 1e-4}
"""On another machine, relative."""
SAYS = {"losses": "loss", "grad_norms": "gradient norm"}
RECORD = "python tests/equality/record.py"


class Difference(NamedTuple):
    """A figure that is not the recorded one."""

    case: str
    step: int
    figure: str
    found: float
    recorded: float

    def __str__(self) -> str:
        apart = f"relative {distance(self.found, self.recorded):.1e}"
        return f"{self.case}: step {self.step}: {self.figure} {self.found!r}, recorded {self.recorded!r} ({apart})"


class Recording(NamedTuple):
    """The file: which machine, and what it found."""

    machine: dict[str, str]
    cases: dict[str, Figures]


def read(path: Path) -> Recording:
    """A recording from its file."""
    told = json.loads(path.read_text())
    return Recording(told["machine"], {name: Figures(**figures) for name, figures in told["cases"].items()})


def write(recording: Recording, path: Path) -> None:
    """The file, a line a column of figures."""
    lines = [f' "machine": {json.dumps(recording.machine)},', ' "cases": {']
    for name, figures in recording.cases.items():
        columns = ",\n".join(f'   "{key}": {json.dumps(values)}' for key, values in figures._asdict().items())
        lines.append(f'  "{name}": {{\n{columns}\n  }},')
    lines[-1] = lines[-1].removesuffix(",")
    path.write_text("\n".join(["{", *lines, " }", "}", ""]))


def distance(found: float, recorded: float) -> float:
    """Relative; infinite where one of them is not a number."""
    apart = abs(found - recorded) / max(abs(recorded), 1e-30)
    return apart if apart == apart else float("inf")


def differences(name: str, found: Figures, recorded: Figures, *, exact: bool) -> Iterator[Difference]:
    """Every figure of a case that is another: by a bit where `exact`, else by more than its limit."""
    for key, limit in LIMITS.items():
        pairs = zip(getattr(found, key), getattr(recorded, key), strict=True)
        for step, (mine, theirs) in enumerate(pairs, start=1):
            if mine != theirs and (exact or not distance(mine, theirs) <= limit):
                yield Difference(name, step, SAYS[key], mine, theirs)


def row(name: str, found: Figures, recorded: Figures, verdict: str) -> str:
    """A line of the table: the greatest distance of each figure."""
    farthest = [
        max(distance(*pair) for pair in zip(getattr(found, key), getattr(recorded, key), strict=True)) for key in LIMITS
    ]
    return f"{name:36} {farthest[0]:8.1e} {farthest[1]:13.1e}  {verdict}"


def check(names: Sequence[str], recording: Recording) -> list[Difference]:
    """Run the cases and print the table; returns what differs."""
    here, tables = machine(), cases()
    exact = here == recording.machine
    if exact:
        print("the machine that recorded: equal bit for bit")
    else:
        others = ", ".join(key for key in here if here[key] != recording.machine.get(key))
        limits = ", ".join(f"{SAYS[key]} {limit:g}" for key, limit in LIMITS.items())
        print(f"another machine than recorded ({others}): relative limits {limits}")
    print(f"{'case':36} {'loss':>8} {'gradient norm':>13}")
    every: list[Difference] = []
    with TemporaryDirectory() as folder:
        for name in names:
            found = run(tables[name], Path(folder) / name)
            differing = list(differences(name, found, recording.cases[name], exact=exact))
            print(row(name, found, recording.cases[name], "differs" if differing else "equal"), flush=True)
            every += differing
    for difference in every:
        print(difference)
    return every


def record(names: Sequence[str], path: Path) -> None:
    """Run the cases and write them into the file, beside those of the same machine that are there."""
    tables, found = cases(), dict[str, Figures]()
    with TemporaryDirectory() as folder:
        for name in names:
            found[name] = run(tables[name], Path(folder) / name)
            print(name, flush=True)
    kept: Mapping[str, Figures] = {}
    if len(names) < len(tables) and path.exists():
        old = read(path)
        if old.machine != machine():
            raise SystemExit(f"{path}: recorded on another machine; record all cases together: {RECORD}")
        kept = old.cases
    both = {**kept, **found}
    write(Recording(machine(), {name: both[name] for name in tables if name in both}), path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog=RECORD, description="Record or compare ten steps of every mixer and family.")
    parser.add_argument("--check", action="store_true", help="compare with the recorded figures, write nothing")
    parser.add_argument("--only", action="append", metavar="NAME", help="cases whose name holds NAME; may be repeated")
    parser.add_argument("--file", type=Path, default=RECORDED, help="default: %(default)s")
    options = parser.parse_args(arguments)
    only: list[str] = options.only or [""]
    names = [name for name in cases() if any(part in name for part in only)]
    if not names:
        parser.error(f"--only {' '.join(only)}: no such case; cases: {', '.join(cases())}")
    if not options.check:
        record(names, options.file)
        return 0
    recording = read(options.file)
    if missing := [name for name in names if name not in recording.cases]:
        print(f"not recorded: {', '.join(missing)}; record them: {RECORD} --only {missing[0]}")
        return 1
    if every := check(names, recording):
        differing = len({difference.case for difference in every})
        print(f"{differing} of {len(names)} cases differ; a change that means this records anew: {RECORD}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
