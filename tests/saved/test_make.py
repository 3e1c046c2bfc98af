"""What is saved here can be made again elsewhere, and is never made again here."""

from __future__ import annotations

from pathlib import Path

import make
import pytest
from saved_run import HERE, STEP, expected, figures, recipe_of, resumed, unpack


def test_an_artefact_is_made_into_another_folder_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tmp_path / "made"), "--only", "checkpoints/based", "--only", "recipes/mom_gla-inner"]
    assert make.main(arguments) == 0
    archive = tmp_path / "made" / "checkpoints" / "based.tar.xz"
    folder = unpack(archive, tmp_path / "run")
    assert figures(resumed(folder, recipe_of(folder / STEP)))["loss"] == pytest.approx(expected(archive)["loss"])
    before = archive.read_bytes()
    capsys.readouterr()
    assert make.main(arguments) == 1
    assert "has checkpoints/based, recipes/mom_gla-inner: what was saved stays" in capsys.readouterr().out
    assert archive.read_bytes() == before


def test_nothing_here_is_made_again(capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in HERE.rglob("*.tar.xz")}
    assert make.main([]) == 1
    assert f"{HERE} has checkpoints/based, " in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in HERE.rglob("*.tar.xz")} == before


def test_all_of_it_is_small() -> None:
    files = [path for path in HERE.rglob("*.*") if path.is_file() and not path.suffix.startswith(".py")]
    assert sum(path.stat().st_size for path in files) < 640_000
