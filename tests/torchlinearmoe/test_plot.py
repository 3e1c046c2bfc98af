"""The command that draws runs, as a user types it."""

import sys
from pathlib import Path

import pytest

from torchlinearmoe.plot import main

LINES = '{"step": 1, "loss": 4.0, "tokens": 64, "tokens_per_second": 10.0}\n{"step": 3, "validation_loss": 3.5}\n'


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("axis", ["tokens", "steps", "hours"])
def test_the_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], axis: str) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text(LINES)
    output = tmp_path / "pictures"
    assert main([str(tmp_path), "--x", axis, "--output", str(output), "--smooth", "3"]) == 0
    files = [Path(name) for name in capsys.readouterr().out.splitlines()]
    assert files == [output / "loss.png", output / "throughput.png"] and all(file.is_file() for file in files)


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text(LINES)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    told = fails([str(tmp_path), "--output", str(tmp_path / "x")], capsys)
    assert told.startswith("error: plot needs matplotlib") and "torchlinearmoe[plot]" in told
    assert not (tmp_path / "x").exists()


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert fails([str(tmp_path), "--smooth", "0"], capsys) == "error: --smooth 0: must be at least 1\n"
    assert "metrics.jsonl: cannot be read" in fails([str(tmp_path)], capsys)
