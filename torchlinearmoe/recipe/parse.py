"""TOML and `--section.key=value` into the dataclasses of `schema.py`, and back.

A recipe is resolved by layers of plain dictionaries, later ones winning: the family's size preset, the file, the
command line. Then every value is checked against its field's annotation.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from torchlinearmoe.errors import RecipeError, nearest
from torchlinearmoe.families import FAMILIES, Family
from torchlinearmoe.families.base import DIMENSIONS
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.models.layer_mixers import used_sections
from torchlinearmoe.recipe import schema
from torchlinearmoe.recipe.remarks import not_read, unread
from torchlinearmoe.recipe.validate import validate

SECTIONS = {
    "model": schema.ModelRecipe,
    "moe": schema.MoERecipe,
    "data": schema.DataRecipe,
    "training": schema.TrainingRecipe,
    "optimizer": schema.OptimizerRecipe,
    "parallel": schema.ParallelRecipe,
    "checkpoint": schema.CheckpointRecipe,
    "metrics": schema.MetricsRecipe,
    "evaluation": schema.EvaluationRecipe,
}
NESTED = {"moe", "mixer_options"}
"""Fields of ModelRecipe that are sections of their own in the file."""

EXCLUSIVE = (("training", "steps", "tokens"), ("optimizer", "warmup_steps", "warmup_tokens"))
"""(section, one key, other key): two ways to say one thing. The command line's way drops the file's."""
MOVED = {"model.qkv_bias": ("softmax_attention", "qkv_bias")}
"""Keys of earlier versions, and the mixer whose option each is today."""
MAX_BYTES = 16 * 2**20
"""Of a recipe's file."""
MAX_INTEGER = 2**63 - 1
"""TOML's whole numbers have 64 bits."""

SECTION_NAMES = {"model.moe": "moe", "model.mixer_options": "mixer"}
"""Where a recipe object differs from its file."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> schema.Recipe:
    """Read a TOML recipe and apply `section.key=value` overrides (a leading `--` is allowed).

    Raises RecipeError, one line naming the field and the nearest legal key or value.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:  # a pipe or a device need not end
            content = stream.read(MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not a TOML file: byte {error.start} is not UTF-8") from None
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{path}: not a recipe: more than {MAX_BYTES} bytes")
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        raise RecipeError(f"{path}: not valid TOML: {error}") from None
    try:
        return resolve(data, parse_overrides(overrides))
    except RecipeError as error:
        if data:
            raise
        raise RecipeError(f"{path}: the recipe is empty; {error}") from None


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`["--model.num_layers=4"]` to `{"model": {"num_layers": 4}}`; values are TOML, else a bare string."""
    tree: dict[str, Any] = {}
    for item in overrides:
        key, equals, value = item.removeprefix("--").partition("=")
        parts = key.split(".")
        if not equals or len(parts) < 2 or not all(parts):
            raise RecipeError(f"'{item}': an override reads --section.key=value")
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise RecipeError(f"'{item}': '{part}' is given a value elsewhere on the command line")
        node[parts[-1]] = _parse_value(value)
    return tree


def _parse_value(text: str) -> Any:
    try:
        tables = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return tables["value"] if len(tables) == 1 else text


def resolve(file: Mapping[str, Any], command_line: Mapping[str, Any] | None = None) -> schema.Recipe:
    """Merge preset, file and command line into a checked Recipe."""
    command_line = command_line or {}
    file = {name: dict(section) if isinstance(section, dict) else section for name, section in file.items()}
    file, command_line = _moved(file), _moved(command_line)
    for source in (file, command_line):
        _check_sections(source)
    _drop_replaced(file, command_line)
    merged = {name: {**file.get(name, {}), **command_line.get(name, {})} for name in SECTIONS}
    for section, *keys in EXCLUSIVE:
        if all(key in merged[section] for key in keys):
            raise RecipeError(f"{section}.{keys[0]} and {section}.{keys[1]} exclude each other; give one")

    family, size = _preset(merged["model"])
    preset = family.preset(size)
    model = {**preset["model"], **merged["model"]}
    moe = {**preset["moe"], **merged["moe"]}
    if model.get("mixers") and "num_layers" not in merged["model"] and isinstance(model["mixers"], list):
        model["num_layers"] = len(model["mixers"])
    if "head_dim" not in model:
        model["head_dim"] = _default_head_dim(model)
    brought = family.mixer_options(size)
    sources = (brought, file.get("mixer", {}), command_line.get("mixer", {}))
    mixer_tables = {
        name: {key: value for source in sources for key, value in source.get(name, {}).items()}
        for name in MIXERS.names()
    }
    options = {name: build(MIXERS[name].Options, table, f"mixer.{name}") for name, table in mixer_tables.items()}
    sections = {name: build(SECTIONS[name], merged[name], name) for name in SECTIONS if name not in ("model", "moe")}
    recipe = schema.Recipe(
        model=build(
            schema.ModelRecipe,
            model,
            "model",
            moe=build(schema.MoERecipe, moe, "moe"),
            mixer_options=options,
        ),
        **sections,
    )
    validate(recipe)
    _check_read(recipe, command_line)
    return _without_unused(recipe)


def _moved(source: Mapping[str, Any]) -> dict[str, Any]:
    """The tables with every key of earlier versions where it is today; they are not changed themselves."""
    tables = {name: dict(table) if isinstance(table, Mapping) else table for name, table in source.items()}
    for old, (mixer, key) in MOVED.items():
        section, _, name = old.partition(".")
        if not isinstance(tables.get(section), dict) or name not in tables[section]:
            continue
        options = tables.setdefault("mixer", {})
        table = options.get(mixer, {}) if isinstance(options, dict) else None
        if not isinstance(table, Mapping):
            continue  # which is refused for what it is
        if key in table:
            raise RecipeError(f"{old}: is called mixer.{mixer}.{key} now, which is given too; take {old} out")
        options[mixer] = {**table, key: tables[section].pop(name)}
    return tables


def _check_read(recipe: schema.Recipe, command_line: Mapping[str, Any]) -> None:
    """Raise RecipeError for a key of the command line that makes no difference to this recipe."""
    used = used_sections(recipe.model)
    for name, table in command_line.get("mixer", {}).items():
        for key, value in table.items():
            if name not in used:
                raise RecipeError(f"mixer.{name}.{key} = {value!r}: no layer runs {name}; in use: {', '.join(used)}")
    for key, needs in unread(recipe).items():
        section, _, name = key.partition(".")
        if name in command_line.get(section, {}):
            raise RecipeError(not_read(recipe, key, needs))


def _without_unused(recipe: schema.Recipe) -> schema.Recipe:
    """The recipe with defaults for what was checked and makes no difference, so that equal models are equal recipes.

    These are the options of mixers not in use, and `layout` beside `mixers`.
    """
    model = recipe.model
    used = used_sections(model)
    options = {name: value if name in used else type(value)() for name, value in model.mixer_options.items()}
    layout = schema.ModelRecipe.layout if model.mixers else model.layout
    return dataclasses.replace(recipe, model=dataclasses.replace(model, mixer_options=options, layout=layout))


def _check_sections(source: Mapping[str, Any]) -> None:
    for name, section in source.items():
        if name not in SECTIONS and name != "mixer":
            raise RecipeError(f"[{name}]: unknown section; {nearest(name, [*SECTIONS, 'mixer'])}")
        if not isinstance(section, Mapping):
            raise RecipeError(f"{name}: must be a section [{name}], not the value {section!r}")
    for name, table in source.get("mixer", {}).items():
        if name not in MIXERS:
            raise RecipeError(f"[mixer.{name}]: unknown mixer; {nearest(name, MIXERS.names())}")
        if MIXERS.canonical(name) != name:
            raise RecipeError(f"[mixer.{name}]: its options are those of [mixer.{MIXERS.canonical(name)}]; write that")
        if not isinstance(table, Mapping):
            raise RecipeError(f"mixer.{name}: must be a section [mixer.{name}], not the value {table!r}")


def _drop_replaced(file: dict[str, Any], command_line: Mapping[str, Any]) -> None:
    """Remove from the file what the command line replaces by another key."""
    model = command_line.get("model", {})
    if "family" in model or "size" in model:
        for section, keys in DIMENSIONS.items():
            file[section] = {key: value for key, value in file.get(section, {}).items() if key not in keys}
        for mixer, keys in Family.mixer_dimensions().items():
            table = file.get("mixer", {}).get(mixer, {})
            kept = {key: value for key, value in table.items() if key not in keys}
            file["mixer"] = {**file.get("mixer", {}), mixer: kept}
    for section, first, second in (*EXCLUSIVE, ("model", "layout", "mixers"), ("data", "paths", "sources")):
        mine = command_line.get(section, {})
        for key, other in ((first, second), (second, first)):
            if key in mine and other not in mine:
                file.get(section, {}).pop(other, None)


def _preset(model: Mapping[str, Any]) -> tuple[Family, str]:
    """The family and the size whose preset it is."""
    family = model.get("family", "qwen2")
    size = model.get("size", "debug")
    if not isinstance(family, str) or family not in FAMILIES:
        raise RecipeError(f"model.family = {family!r}: unknown family; {nearest(str(family), FAMILIES)}")
    if not isinstance(size, str) or size not in FAMILIES[family].presets:
        raise RecipeError(
            f"model.size = {size!r}: no such size of {family}; {nearest(str(size), FAMILIES[family].presets)}"
        )
    return FAMILIES[family], size


def _default_head_dim(model: Mapping[str, Any]) -> Any:
    width, heads = model.get("hidden_size"), model.get("num_heads")
    if isinstance(width, int) and isinstance(heads, int) and heads > 0:
        return max(width // heads, 1)
    return 1


# ---------------------------------------------------------------------------------------------------------------------
# values by annotation


def build(cls: type, table: Mapping[str, Any], where: str, **ready: Any) -> Any:
    """An instance of the dataclass `cls` from a table, each value checked against its annotation."""
    hints = typing.get_type_hints(cls)
    legal = [f.name for f in dataclasses.fields(cls) if f.name not in NESTED]
    values: dict[str, Any] = dict(ready)
    for key, value in table.items():
        if key not in legal:
            raise RecipeError(f"{where}.{key}: unknown key; {nearest(key, legal)}")
        values[key] = _coerce(value, hints[key], f"{where}.{key}")
    return cls(**values)


def _quoted(where: str, value: Any) -> str:
    """How a list is written on a command line, for a string that was one before a shell took its quotes."""
    if not isinstance(value, str):
        return ""
    entries = [entry.strip(" \"'") for entry in value.strip("[]").split(",")]
    return f"; on a command line in single quotes: '--{where}={json.dumps(entries, ensure_ascii=False)}'"


def _coerce(value: Any, hint: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return _coerce(value, inner[0], where)
    if origin is Literal:
        legal = typing.get_args(hint)
        if value not in legal or isinstance(value, bool):
            raise RecipeError(f"{where} = {value!r}: not a legal value; {nearest(str(value), map(str, legal))}")
        return value
    if origin is tuple:
        args = typing.get_args(hint)
        if not isinstance(value, (list, tuple)):
            raise RecipeError(f"{where} = {value!r}: must be a list{_quoted(where, value)}")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise RecipeError(f"{where} = {list(value)!r}: must have {len(args)} entries")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(_coerce(item, kind, where) for item, kind in zip(value, kinds, strict=True))
    table: Any = hint
    if dataclasses.is_dataclass(table):
        if not isinstance(value, Mapping):
            raise RecipeError(
                f"{where} = {value!r}: must be a table of {', '.join(f.name for f in dataclasses.fields(table))}"
            )
        missing = [
            f.name for f in dataclasses.fields(table) if f.default is dataclasses.MISSING and f.name not in value
        ]
        if missing:
            raise RecipeError(f"{where} = {dict(value)!r}: names no {missing[0]}")
        return build(hint, value, where)
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise RecipeError(f"{where}: a number of {value.bit_length()} bits; must fit in 64")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, bool) or not isinstance(value, hint):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
        shown = repr(value)
        raise RecipeError(f"{where} = {shown if len(shown) < 200 else shown[:200] + '...'}: must be {names[hint]}")
    if hint is float and not math.isfinite(value):
        raise RecipeError(f"{where} = {value}: must be finite")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# back to TOML


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """A recipe as {"section.key": value}, with `[moe]` and `[mixer.*]` as sections of their own."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    elif isinstance(value, Mapping):
        items = dict(value)
    else:
        return {prefix: _plain(value)}
    flat: dict[str, Any] = {}
    for key, item in items.items():
        path = f"{prefix}.{key}" if prefix else key
        flat |= flatten(item, SECTION_NAMES.get(path, path))
    return flat


def read_keys(recipe: schema.Recipe) -> dict[str, Any]:
    """A recipe as {"section.key": value}, without the options of mixers that no layer runs."""
    used = used_sections(recipe.model)
    return {
        key: value
        for key, value in flatten(recipe).items()
        if not (key.startswith("mixer.") and key.split(".")[1] not in used)
    }


def _plain(value: Any) -> Any:
    """A value without dataclasses in its lists."""
    if isinstance(value, tuple):
        return tuple(dataclasses.asdict(item) if dataclasses.is_dataclass(item) else item for item in value)  # pyright: ignore[reportArgumentType]
    return value


def dump(recipe: schema.Recipe) -> str:
    """The resolved recipe as TOML; `load_recipe` of it gives an equal recipe."""
    model = recipe.model
    blocks = [_dump_section("model", model), _dump_section("moe", model.moe)]
    blocks += [_dump_section(f"mixer.{name}", model.mixer_options[name]) for name in used_sections(model)]
    blocks += [_dump_section(name, getattr(recipe, name)) for name in SECTIONS if name not in ("model", "moe")]
    return "\n".join(block for block in blocks if block)


def _dump_section(name: str, section: Any) -> str:
    lines = [f"[{name}]"]
    for entry in dataclasses.fields(section):
        value = getattr(section, entry.name)
        if entry.name in NESTED or value is None or (entry.name == "mixers" and not value):
            continue
        if entry.name == "layout" and section.mixers:
            continue
        lines.append(f"{entry.name} = {to_toml(value)}")
    return "\n".join(lines) + "\n" if len(lines) > 1 else ""


def to_toml(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, except that TOML wants the delete character escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {to_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(to_toml(item) for item in value) + "]"
    return repr(value)
