"""The tool tells a formula that is off by a thousandth from rounding, and rounding only where it recorded."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from equality_run import Figures, cases
from record import RECORDED, differences, main, read

from torchlinearmoe.mixers import recurrence

CASE = "hgrn2"
ROUNDING = 1 + 2.0**-23
Changed = Callable[[inspect.BoundArguments], float]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of this machine."""
    path = tmp_path_factory.mktemp("recorded") / "here.json"
    assert main(["--only", CASE, "--file", str(path)]) == 0
    return path


@pytest.fixture
def elsewhere(here: Path, tmp_path: Path) -> Path:
    """The same figures from another machine."""
    told = json.loads(here.read_text())
    told["machine"]["processor"] = "another"
    (tmp_path / "elsewhere.json").write_text(json.dumps(told))
    return tmp_path / "elsewhere.json"


def change(monkeypatch: pytest.MonkeyPatch, changed: Changed) -> None:
    """Let `changed` alter the arguments of the linear recurrence, and multiply its output by what it returns."""
    usual = recurrence.linear_kernel
    signature = inspect.signature(usual)

    def other(*arguments: Any, **options: Any) -> Any:
        bound = signature.bind(*arguments, **options)
        factor = changed(bound)
        o, *rest = usual(*bound.args, **bound.kwargs)
        return o * factor, *rest

    monkeypatch.setattr(recurrence, "linear_kernel", other)


def slower_decay(bound: inspect.BoundArguments) -> float:
    bound.arguments["log_decay"] = bound.arguments["log_decay"] * 0.999
    return 1.0


def check(path: Path) -> int:
    return main(["--check", "--only", CASE, "--file", str(path)])


def test_the_same_code_is_equal_bit_for_bit_where_it_was_recorded(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(here) == 0
    told = capsys.readouterr().out
    assert "equal bit for bit" in told and f"{CASE:36}  0.0e+00       0.0e+00  equal" in told


@pytest.mark.parametrize("machine", ["here", "elsewhere"])
def test_a_decay_off_by_a_thousandth_is_told_by_case_step_and_figure(
    machine: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change(monkeypatch, slower_decay)
    assert check(request.getfixturevalue(machine)) == 1
    told = capsys.readouterr().out
    assert re.search(rf"^{CASE}: step \d+: (loss|gradient norm) \d.*, recorded \d", told, re.MULTILINE)
    count = sum(CASE in name for name in cases())
    assert f"{count} of {count} cases differ" in told


def test_rounding_is_accepted_elsewhere_and_not_where_it_was_recorded(
    here: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change(monkeypatch, lambda _: ROUNDING)
    assert check(elsewhere) == 0
    assert "another machine than recorded (processor)" in capsys.readouterr().out
    assert check(here) == 1
    assert f"{CASE}: step " in capsys.readouterr().out


def test_one_case_is_not_recorded_beside_those_of_another_machine(elsewhere: Path) -> None:
    before = elsewhere.read_text()
    with pytest.raises(SystemExit, match="recorded on another machine; record all cases together"):
        main(["--only", CASE, "--file", str(elsewhere)])
    assert elsewhere.read_text() == before


def test_a_case_that_was_not_recorded_and_one_that_there_is_not_are_named(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--check", "--only", "retention", "--file", str(here)]) == 1
    assert "not recorded: retention" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--check", "--only", "nothing"])
    assert "no such case; cases: based, " in capsys.readouterr().err


def test_what_is_not_a_number_differs() -> None:
    bad, good = Figures([1.0, float("nan")], [1.0, 1.0]), Figures([1.0, 1.0], [1.0, 1.0])
    for exact in (True, False):
        (difference,) = differences("gla", bad, good, exact=exact)
        assert str(difference).startswith("gla: step 2: loss nan, recorded 1.0")


def test_every_recorded_case_is_still_run() -> None:
    assert read(RECORDED).cases.keys() <= cases().keys()
