"""What exists is listed: commands, and every recipe key with its default, legal values and meaning."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from torchlinearmoe import FAMILIES, MIXERS
from torchlinearmoe.__main__ import COMMANDS, main
from torchlinearmoe.keys import describe, docstrings, sections
from torchlinearmoe.recipe import load_recipe, parse, resolve

ROOT = Path(__file__).parents[2]


def test_every_key_is_told_with_its_default_and_meaning() -> None:
    lines = list(describe())
    recorded = json.loads((ROOT / "tests/saved/names.json").read_text())["recipe"]
    keys = [key for key in recorded if recorded[key] != "legal"]
    told = {line.partition(" = ")[0]: index for index, line in enumerate(lines) if " = " in line and line[0] != " "}
    assert set(told) == set(keys)
    for key, index in told.items():
        default, _, legal = lines[index].partition(" = ")[2].partition("    (")
        assert legal.endswith(")") and len(legal) > 3, key
        assert lines[index + 1].strip(), f"{key} says nothing"
        recorded_default = recorded[key].partition(" = ")[2]
        assert default == {"": default, "None": "absent"}.get(recorded_default, default), key
    assert max(len(line) for line in lines if line.startswith("    ") and " arXiv" not in line) < 150
    assert all(any(line.startswith(f"    {name} ") for line in lines) for name in [*MIXERS.names(), *FAMILIES])


def test_what_is_told_can_be_said() -> None:
    """Defaults are read back, and each word of a choice is legal."""
    for section, cls in sections().items():
        for line in describe(section):
            if not line.startswith(f"{section}."):
                continue
            key, _, rest = line.partition(" = ")
            default, _, legal = rest.partition("    (")
            if default not in ("absent", "by family and size"):
                value = tomllib.loads(f"x = {default}")["x"]
                parse.build(cls, {key.rpartition(".")[2]: value}, section) if section not in ("model", "moe") else None
    for mixer in MIXERS.names():
        resolve({"model": {"mixer": mixer}, "training": {"steps": 1}})


@pytest.mark.parametrize(
    ("wanted", "first"),
    [
        ("training.steps", "training.steps = absent    (whole number)"),
        ("moe.balance", 'moe.balance = "loss"    (loss | bias | none)'),
        ("optimizer.betas", "optimizer.betas = [0.9, 0.95]    (list of number and number)"),
        (
            "model.attention_backend",
            'model.attention_backend = "auto"    (auto | cudnn | reference | flash3 | flash4 | flex | sdpa | varlen)',
        ),
        ("data", "[data]"),
        ("mixer.gla", "[mixer.gla]"),
    ],
)
def test_a_section_or_a_key_is_told_alone(wanted: str, first: str) -> None:
    lines = list(describe(wanted))
    assert lines[0] == first
    assert all(not line or line.startswith((" ", "[", wanted)) for line in lines)


@pytest.mark.parametrize(("wanted", "names"), [("mixers", MIXERS.names()), ("families", FAMILIES)])
def test_mixers_and_families_are_listed_alone(wanted: str, names: object) -> None:
    assert [line.split()[0] for line in list(describe(wanted))[1:]] == list(names)  # pyright: ignore


def test_options_that_mixers_have_in_common_keep_their_words() -> None:
    assert set(docstrings(MIXERS["gla"].Options)) >= {"heads", "head_dim", "conv", "kv_heads"}


def test_the_commands_are_listed_and_each_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert all(f"  {name} " in out for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as done:
            main([name, "--help"])
        assert done.value.code == 0 and "usage: " in capsys.readouterr().out
    (script,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].items()
    module, _, function = script[1].partition(":")
    assert script[0] == "torchlinearmoe" and getattr(import_module(module), function) is main


def test_what_is_no_command_or_key_is_told_with_all_that_is(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, told in (
        (["trian"], f"error: trian: no such command; did you mean 'train'? legal: {', '.join(sorted(COMMANDS))}"),
        (["keys", "trainig"], "error: trainig: no such section or key; legal: model, moe, data, training, "),
    ):
        with pytest.raises(SystemExit) as done:
            main(arguments)
        assert done.value.code == 1 and capsys.readouterr().err.startswith(told)


def test_the_package_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torchlinearmoe", "keys", "training.steps"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("training.steps = absent")
    (tmp_path / "r.toml").write_text("[training]\nsteps = 1\n")
    assert load_recipe(tmp_path / "r.toml").training.steps == 1
