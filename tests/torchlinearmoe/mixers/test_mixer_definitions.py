"""Every registered mixer, with its defaults and with every variant, computes what its paper says."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from definition_check import FOLDER, check_definition, definition_of
from mixer_cases import Case, every_mixer

from torchlinearmoe.mixers import MIXERS


@every_mixer
def test_a_mixer_is_its_definition_in_outputs_and_gradients(case: Case):
    check_definition(case, definition_of(case.name))


@pytest.mark.parametrize("name", MIXERS.names())
def test_a_mixer_is_its_definition_with_the_recurrences_token_by_token_too(name: str):
    check_definition(Case(name, {}), definition_of(name), kernel_backend="reference")


def test_every_definition_is_one_of_a_registered_mixer():
    defined = {path.stem for path in FOLDER.glob("*.py") if "\ndef definition(" in path.read_text()}
    assert defined == set(MIXERS.names())


def test_no_definition_uses_the_library():
    allowed = {"__future__", "collections", "dataclasses", "definitions", "importlib", "math", "torch", "typing"}
    for path in FOLDER.glob("*.py"):
        used = {name.split(".")[0] for name in _imports(path)}
        assert used <= allowed, f"{path.name}: {sorted(used - allowed)}"


def _imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
