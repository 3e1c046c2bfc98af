"""`benchmark prepare` on little text: the library and each number of workers have their row."""

from __future__ import annotations

import pytest

from torchlinearmoe.benchmark import __main__ as command
from torchlinearmoe.benchmark import prepare


def test_the_library_and_preparing_are_timed(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    tables: dict[str, list] = {}
    monkeypatch.setattr(prepare, "show", lambda title, rows: tables.update({title: list(rows)}))
    assert command.main(["prepare", "--megabytes", "3", "--workers", "1", "2", "1"]) == 0
    ((title, rows),) = tables.items()
    assert title.startswith("prepare, 3.0 MB of text, bpe-1024.tiktoken")
    assert [row["contestant"] for row in rows] == ["library alone", "prepare --workers 1", "prepare --workers 2"]
    assert all(row["MB/s"] > 0 and row["MB/s a core"] > 0 for row in rows)
    assert all(row["of the library, a core"] > 0 for row in rows[1:])
    file = tmp_path / "some.jsonl"
    assert prepare.write_documents(file, 0.01) >= 1e4 and len(file.read_text().splitlines()) >= 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--megabytes", "0"], "--megabytes 0.0: must be at least 1"),
        (["--model.layout=L"], "preparing has no recipe"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(arguments, words, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["prepare", *arguments])
    assert words in capsys.readouterr().err
