"""No name of a saved tensor, and no key of a recipe, vanishes or changes unnoticed."""

from __future__ import annotations

import json
from pathlib import Path

import names
import pytest

RECORDED, NOW = names.read(), names.groups()


@pytest.mark.parametrize("group", [*RECORDED, *(group for group in NOW if group not in RECORDED)])
def test_every_name_is_still_there_and_every_new_one_is_written_down(group: str) -> None:
    recorded, now = RECORDED.get(group, {}), NOW.get(group, {})
    problems = [*names.lost(group, recorded, now), *names.new(group, recorded, now)]
    assert not problems and group in RECORDED, "\n".join(problems or [f"{group} is new; write it down: {names.RECORD}"])


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `names.json` that the tool works on."""
    path = tmp_path / "names.json"
    path.write_text(names.RECORDED.read_text())
    monkeypatch.setattr(names, "RECORDED", path)
    monkeypatch.setattr(names, "groups", lambda: NOW)
    return path


def test_new_names_are_written_down(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older = json.loads(written.read_text())
    del older["mixer gla"]["*.mixer.g_proj.weight"]
    written.write_text(json.dumps(older))
    assert names.main() == 0
    assert capsys.readouterr().out.splitlines() == ["mixer gla: *.mixer.g_proj.weight is new"]
    assert json.loads(written.read_text()) == NOW


@pytest.mark.parametrize(
    "group, name, rule, told",
    [
        ("mixer gla", "*.mixer.gone.weight", "64x64, 96x96", "gone.weight (64x64, 96x96) vanished: convert"),
        (
            "mixer hgrn2",
            "shared.hgrn2.table",
            "3x64, 3x96",
            "shared.hgrn2.table is 2x64, 2x96, was 3x64, 3x96: convert",
        ),
        ("recipe", "optimizer.lr", "float = 1.0", "optimizer.lr is float = 0.0003, was float = 1.0: convert"),
        ("optimizer adamw", "momentum", "as its parameter", "momentum (as its parameter) vanished: convert"),
        ("mixer forgotten", "*.mixer.q", "64", "mixer forgotten: *.mixer.q (64) vanished: convert"),
    ],
)
def test_what_vanished_or_changed_is_named_and_stays_written(
    written: Path, group: str, name: str, rule: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    older = json.loads(written.read_text())
    older.setdefault(group, {})[name] = rule
    written.write_text(json.dumps(older))
    assert names.main() == 1
    assert told in capsys.readouterr().out
    assert json.loads(written.read_text()) == older
