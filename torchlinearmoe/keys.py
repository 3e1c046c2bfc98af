"""The command: `torchlinearmoe keys [SECTION | SECTION.KEY]`: what a recipe may say.

Everything is read from where it is declared: defaults and docstrings of the dataclasses, limits of `validate.py`,
backends of `kernels/`, the registries.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import sys
import textwrap
import typing
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Literal

from torchlinearmoe.commands import Failure, failures_on_one_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Print recipe keys; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="torchlinearmoe keys",
        description="Every recipe key with its default, legal values and what it means; mixers, families and sizes.",
    )
    parser.add_argument(
        "section",
        nargs="?",
        default="",
        help="e.g. training, mixer.gla, mixers, families, model.layout; left out: all",
    )
    options = parser.parse_args(arguments)
    with failures_on_one_line():
        print("\n".join(describe(options.section)))
    return 0


def sections() -> dict[str, type]:
    """Every section by its name in a recipe, and the dataclass that declares its keys."""
    from torchlinearmoe.mixers import MIXERS
    from torchlinearmoe.recipe.parse import SECTIONS

    return {**SECTIONS, **{f"mixer.{name}": MIXERS[name].Options for name in MIXERS.names()}}


def describe(wanted: str = "") -> Iterator[str]:
    """Lines about a section, about a key, or about everything. Raises Failure that lists what there is."""
    from torchlinearmoe.recipe.parse import NESTED

    found = False
    for section, cls in sections().items():
        fields = [field for field in dataclasses.fields(cls) if field.name not in NESTED]
        if wanted not in ("", section, section.split(".")[0]):
            fields = [field for field in fields if wanted == f"{section}.{field.name}"]
        elif fields:
            yield from (f"[{section}]", "")
        for field in fields:
            yield from describe_key(section, cls, field)
        found = found or bool(fields) or wanted == section
    lists = {"mixers": _mixers, "families": _families}
    for name, lines in lists.items():
        if wanted in ("", "model", "mixer", name):
            yield from lines()
    if not found and wanted not in lists:
        legal = ", ".join([*sections(), *lists])
        raise Failure(f"{wanted}: no such section or key; legal: {legal}, or SECTION.KEY of a section")


def describe_key(section: str, cls: type, field: dataclasses.Field[Any]) -> Iterator[str]:
    """A key's line, its docstring, and a blank line."""
    from torchlinearmoe.recipe.parse import to_toml

    if field.default is not dataclasses.MISSING:
        default = "absent" if field.default is None else to_toml(field.default)
    else:
        default = "by family and size"
    yield f"{section}.{field.name} = {default}    ({legal_values(section, field.name, cls)})"
    yield from textwrap.wrap(docstrings(cls).get(field.name, ""), 116, initial_indent="    ", subsequent_indent="    ")
    yield ""


def legal_values(section: str, name: str, cls: type) -> str:
    """What the key may say."""
    from torchlinearmoe.families import FAMILIES
    from torchlinearmoe.kernels.operator import legal_names
    from torchlinearmoe.mixers import MIXERS
    from torchlinearmoe.recipe.validate import LIMITS, MIXER_LIMIT, MIXER_LIMITS

    key = f"{section}.{name}"
    names = {
        "model.family": FAMILIES,
        "model.size": sorted({size for family in FAMILIES for size in FAMILIES[family].presets}),
        "model.mixer": MIXERS.names(),
    }
    if key in names:
        return " | ".join(names[key])
    if key in ("model.attention_backend", "model.kernel_backend", "moe.backend"):
        return " | ".join(legal_names(key))
    told = _kind(typing.get_type_hints(cls)[name])
    limit = LIMITS.get(section, {}).get(name)
    if section.startswith("mixer."):
        limit = MIXER_LIMITS.get(name, MIXER_LIMIT if told == "whole number" else None)
    return told if limit is None else f"{told}, at most {limit}"


def _kind(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is tuple:
        kinds = arguments[:1] if arguments[-1] is Ellipsis else arguments
        return f"list of {' and '.join(map(_kind, kinds))}"
    if dataclasses.is_dataclass(hint):
        return f"table of {', '.join(field.name for field in dataclasses.fields(hint))}"
    if arguments:  # something or None
        return " | ".join(_kind(kind) for kind in arguments if kind is not type(None))
    return {bool: "true | false", int: "whole number", float: "number", str: "string"}[hint]


@cache
def docstrings(cls: type) -> dict[str, str]:
    """What stands under each field of a dataclass and of those it is made of."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:]):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _mixers() -> Iterator[str]:
    """Mixers and what they are."""
    from torchlinearmoe.mixers import MIXERS

    yield "mixers:"
    for name in MIXERS.names():
        module = sys.modules[MIXERS[name].__module__]
        yield f"    {name:20} {(module.__doc__ or '').strip().splitlines()[0]}"


def _families() -> Iterator[str]:
    """Families and their sizes."""
    from torchlinearmoe.families import FAMILIES

    yield "families and sizes:"
    for name in FAMILIES:
        yield f"    {name:20} {', '.join(FAMILIES[name].presets)}"


if __name__ == "__main__":
    sys.exit(main())
