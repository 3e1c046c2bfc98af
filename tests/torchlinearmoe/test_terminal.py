"""What stands in a file reaches the terminal as text: no escape sequence of it is obeyed."""

from __future__ import annotations

import doctest
import io
import json
import logging
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from torchlinearmoe import commands, errors
from torchlinearmoe.checkpoint import find_latest
from torchlinearmoe.commands import Failure, failures_on_one_line
from torchlinearmoe.convert import main as convert
from torchlinearmoe.errors import RecipeError, UserError, visible
from torchlinearmoe.metrics.console import Console
from torchlinearmoe.plan import main as plan

ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\u202e\b"
SPELLED = r"\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\u202e\x08"


@pytest.mark.parametrize("module", [errors, commands])
def test_examples(module: types.ModuleType) -> None:
    results = doctest.testmod(module)
    assert results.attempted > 0 and results.failed == 0


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(commands.time, "monotonic", lambda: float(next(clock)))
    with commands.bytes_bar("tokenising") as tell:
        for done in range(100, 1001, 100):
            tell(done * 10**6, 10**9)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "tokenising: 300 of 1000 MB, 5.0 MB/s, 2:20 left" and len(lines) == 4


def test_control_characters_are_spelled_out_and_letters_are_not() -> None:
    assert visible(ESCAPE) == SPELLED
    assert visible("größer, 大, \tx\n") == "größer, 大, \tx\n"
    assert visible("\udc9b.txt") == r"\udc9b.txt"
    assert str(UserError(f"{ESCAPE}: wrong")) == f"{SPELLED}: wrong"
    assert str(RecipeError(str(RecipeError(ESCAPE)))) == SPELLED


@pytest.mark.parametrize(
    "text",
    [
        f'[model]\n"{ESCAPE!s}" = 1\n',
        '[model]\n"KEY" = 1\n',
        '["KEY"]\n',
        '[mixer."KEY"]\n',
        '[model]\nmixer = "KEY"\n',
        '[model]\nlayout = "KEY"\n',
        '[model]\nfamily = "KEY"\n',
    ],
)
def test_no_recipe_writes_to_the_terminal(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text.replace("KEY", json.dumps(ESCAPE)[1:-1].replace("\x7f", "\\u007f")))
    with pytest.raises(SystemExit):
        plan([str(recipe)])
    written = capsys.readouterr().err
    assert written.startswith("error: ") and written.removesuffix("\n").isprintable()


def test_no_file_name_or_metadata_writes_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / ESCAPE
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": [ESCAPE]}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {ESCAPE: f"{ESCAPE}.safetensors"}}))
    for direction in ("from-hf", "to-hf"):
        with pytest.raises(SystemExit):
            convert([direction, str(folder), str(tmp_path / "out")])
        written = capsys.readouterr().err
        assert SPELLED in written and written.removesuffix("\n").isprintable()
    with pytest.raises(SystemExit), failures_on_one_line():
        raise Failure(ESCAPE)
    assert capsys.readouterr().err == f"error: {SPELLED}\n"
    (folder / "step-1").mkdir()
    with caplog.at_level(logging.WARNING, "torchlinearmoe"):
        assert find_latest(folder) is None
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("torchlinearmoe")]
    assert SPELLED in message and message.isprintable()


def test_no_message_of_a_run_writes_more_than_text() -> None:
    stream = io.StringIO()
    Console(total_steps=1, stream=stream).message(f"resumed from {ESCAPE}")
    assert stream.getvalue() == f"resumed from {SPELLED}\n"


def test_a_pipe_whose_reader_has_ended_is_no_traceback() -> None:
    lines = (
        "from torchlinearmoe.commands import failures_on_one_line",
        "with failures_on_one_line():",
        "    while True: print('line', flush=True)",
    )
    with subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_another_broken_pipe_keeps_its_traceback() -> None:
    with pytest.raises(BrokenPipeError), failures_on_one_line():
        raise BrokenPipeError
