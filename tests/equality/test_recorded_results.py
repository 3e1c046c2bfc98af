"""Ten steps of every mixer and family give the losses and gradient norms that were recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
from equality_run import cases, machine, run
from record import RECORD, RECORDED, differences, read


@pytest.mark.parametrize("name", cases())
def test_ten_steps_give_what_was_recorded(name: str, tmp_path: Path) -> None:
    recording = read(RECORDED)
    assert name in recording.cases, f"{name} is new; record it: {RECORD} --only {name}"
    exact = machine() == recording.machine
    lines = [str(each) for each in differences(name, run(cases()[name], tmp_path), recording.cases[name], exact=exact)]
    assert not lines, "\n".join([*lines, f"a change that means this records anew: {RECORD}"])
