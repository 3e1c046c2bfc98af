"""Recipes that editors and accidents make: read, or refused in one line that names the file or key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from torchlinearmoe.data.chat_template import load_template
from torchlinearmoe.data.sources import find_sources
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.errors import RecipeError, UserError
from torchlinearmoe.recipe import load_recipe, resolve
from torchlinearmoe.run_folder import at_home

SOUND = b'[model]\nmixer = "gla"\n[training]\nsteps = 3\n'


def test_a_byte_order_mark_and_other_line_ends_are_read(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(b"\xef\xbb\xbf" + SOUND.replace(b"\n", b"\r\n"))
    assert load_recipe(tmp_path / "r.toml") == resolve({"model": {"mixer": "gla"}, "training": {"steps": 3}})


@pytest.mark.parametrize("content", [b"", b"\n\n", b"# nothing\n"])
def test_an_empty_recipe_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=rf"^{path}: the recipe is empty; training.steps or training.tokens: give"):
        load_recipe(path)
    assert load_recipe(path, ["training.steps=3"]).training.steps == 3


def test_numbers_of_thousands_of_digits_are_named(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(SOUND.replace(b"3", b"3" * 5000))
    with pytest.raises(RecipeError, match=rf"^{path}: not valid TOML: Exceeds the limit"):
        load_recipe(path)
    path.write_bytes(SOUND)
    with pytest.raises(RecipeError, match=r"^training.steps = '3{199}\.\.\.: must be a whole number$"):
        load_recipe(path, ["training.steps=" + "3" * 5000])


@pytest.mark.parametrize("key", ["capacity_factor", "eval_capacity_factor"])
def test_an_absurd_capacity_is_named(key: str) -> None:
    with pytest.raises(RecipeError, match=rf"^moe.{key} = 1e\+30: must be at most 65536$"):
        resolve({"moe": {key: 1e30}, "training": {"steps": 3}})


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("data", "paths", ["a", "b\0"]),
        ("data", "tokenizer", "\0"),
        ("data", "cache", "x\0"),
        ("data", "chat_template", "\0"),
        ("training", "output_dir", "\0"),
        ("checkpoint", "resume", "\0"),
        ("checkpoint", "init_from", "\0"),
    ],
)
def test_a_zero_byte_in_a_path_is_named(section: str, key: str, value: object) -> None:
    tables = {"training": {"steps": 3}}
    tables[section] = tables.get(section, {}) | {key: value}  # pyright: ignore
    with pytest.raises(RecipeError, match=rf"^{section}.{key} = '.*\\x00': no path holds a zero byte"):
        resolve(tables)


def test_the_home_of_nobody_is_named() -> None:
    told = "= '~nosuchuser': there is no such home here; write the whole path"
    with pytest.raises(UserError, match=f"^data.tokenizer {told}"):
        load_tokenizer("~nosuchuser")
    with pytest.raises(UserError, match=f"^data.paths {told}"):
        find_sources(["~nosuchuser"])
    with pytest.raises(UserError, match=f"^data.chat_template {told}"):
        load_template("~nosuchuser")
    for key in ("training.output_dir", "checkpoint.resume"):
        section, name = key.split(".")
        tables: dict[str, dict[str, object]] = {"training": {"steps": 3}}
        tables.setdefault(section, {})[name] = "~nosuchuser"
        with pytest.raises(UserError, match=f"^{key} {told}"):
            at_home(resolve(tables))


def test_the_home_in_a_run_s_folder_is_meant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = at_home(resolve({"training": {"steps": 3, "output_dir": "~/run"}, "checkpoint": {"resume": "~/step-3"}}))
    assert Path(recipe.training.output_dir) == tmp_path / "run"
    assert Path(recipe.checkpoint.resume) == tmp_path / "step-3"


def test_a_list_without_its_quotes_is_shown_with_them() -> None:
    told = re.escape("""must be a list; on a command line in single quotes: '--data.paths=["a/", "b.txt"]'""")
    for value in ("[a/,b.txt]", "a/, b.txt"):
        with pytest.raises(RecipeError, match=told):
            resolve({"training": {"steps": 3}, "data": {"paths": value}})


@pytest.mark.parametrize(
    "content, told",
    [
        (b"\x7fELF\x02\xff", "not a TOML file: byte 5 is not UTF-8"),
        (b"user = " + b"[" * 100_000, "not valid TOML"),
        (b"user = " + b"9" * 5000, "not valid TOML"),
    ],
)
def test_a_template_that_is_no_text_is_named(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "t.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path}: {told}"):
        load_template(str(path))
