"""The large layouts that the README plans: its commands run, and its table has the figures that they print."""

import json
import re
import shlex
from pathlib import Path

import pytest

from torchlinearmoe.plan import main
from torchlinearmoe.planning.report import format_bytes

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text().split("### Past the machine")[1].split("\n## ")[0]
COMMANDS = [
    shlex.split(line.removeprefix("python -m torchlinearmoe.plan "))
    for line in SECTION.replace("\\\n", " ").splitlines()
    if line.startswith("python -m torchlinearmoe.plan ")
]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in SECTION.splitlines()
    if line.startswith("|") and not line.startswith("|-")
]


def figures(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The cells of a layout's row by column, and the text of its plan."""
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    memory, sent = found["memory"]["largest"], {}
    for entry in found["communication"]["collectives"]:
        axis = {"efsdp": "fsdp"}.get(entry["axis"], entry["axis"])
        sent[axis] = sent.get(axis, 0) + entry["sent_bytes"]
    cells = {row: format_bytes(memory[row]) for row in ("parameters", "gradients", "optimizer", "activations", "total")}
    cells["ranks"] = str(found["world_size"])
    cells |= {
        f"sent: {axis}": format_bytes(sent[axis]) if axis in sent else "-"
        for axis in ("fsdp", "ep", "tensor", "context", "pipeline")
    }
    return cells


@pytest.mark.parametrize("number", range(3))
def test_the_table_has_what_the_commands_print(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    (_, *columns), *rows = ROWS
    assert len(COMMANDS) == len(rows) == 3
    recipe, *rest = COMMANDS[number]
    cells = figures([str(ROOT / recipe), *rest], capsys)
    assert dict(zip(columns, rows[number][1:], strict=True)) == {column: cells[column] for column in columns}
    assert re.search(rf"--world-size {cells['ranks']}\b", " ".join(rest))
