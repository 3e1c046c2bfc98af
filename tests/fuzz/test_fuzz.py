"""A few hundred strange files, always the same; `fuzz.py` runs as many others as one likes."""

import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import Fuzz

from torchlinearmoe.errors import UserError

COUNT = 400


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Fuzz:
    return Fuzz(tmp_path_factory.mktemp("fuzz"), seed=0)


def test_whatever_is_strange_is_one_line_or_works(fuzz: Fuzz) -> None:
    assert [told for number in range(COUNT) if (told := fuzz.run(number))] == []


def test_many_cases_of_each_kind_are_refused_and_some_work(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nothing would be shown."""
    refused: dict[str, int] = {}

    def counted(kind):
        def run(chooser, folder):
            try:
                kind(chooser, folder)
            except UserError:
                refused[kind.__name__] = refused.get(kind.__name__, 0) + 1
                raise

        run.__name__ = kind.__name__
        return run

    monkeypatch.setattr(fuzz, "kinds", [counted(kind) for kind in fuzz.kinds])
    for number in range(200):
        fuzz.run(number)
    assert set(refused) == {kind.__name__ for kind in fuzz.kinds}
    assert all(2 <= count <= 19 for count in refused.values()), refused


def test_what_comes_out_badly_is_told(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(chooser, folder):
        raise KeyError("x")

    monkeypatch.setattr(fuzz, "kinds", [bad])
    told = fuzz.run(7)
    assert told is not None and told.startswith("7 bad: ") and "KeyError: 'x'" in told


@pytest.mark.slow
def test_the_command_takes_any_seed_and_count() -> None:
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), "--seed", "5", "--count", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "0 of 20 cases came out badly\n"), done.stdout
