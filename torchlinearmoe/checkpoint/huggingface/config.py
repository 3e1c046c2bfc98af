"""`config.json` to `[model]` and `[moe]` and back, along the lines that a family's `Architecture` draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchlinearmoe.checkpoint.huggingface.directory import CONFIG
from torchlinearmoe.errors import UserError, nearest
from torchlinearmoe.families import FAMILIES, Family
from torchlinearmoe.families.huggingface import FULL, Architecture, Config, Tables, period
from torchlinearmoe.models.layer_feed_forwards import DENSE, NONE, feed_forwards
from torchlinearmoe.models.layer_mixers import layer_mixers
from torchlinearmoe.recipe import ModelRecipe, Recipe, RecipeError, resolve
from torchlinearmoe.recipe.parse import flatten

UNCHANGED = (
    *("size", "mixer", "layout", "mixers", "init_std", "embed_init_std", "max_length"),
    *("attention_backend", "kernel_backend"),
)
"""`[model]` keys that say nothing about what a trained model of softmax layers computes."""
UNCHANGED_MOE = (
    *("balance", "balance_coefficient", "balance_scope", "z_loss_coefficient", "bias_rate"),
    *("capacity_factor", "drop_policy", "backend"),
)
"""The same of `[moe]`; a selection bias shows in the tensors."""


ROPE: dict[str, tuple[str, dict[str, str]]] = {
    "default": ("none", {}),
    "llama3": (
        "llama3",
        {
            "factor": "rope_factor",
            "original_max_position_embeddings": "rope_original_length",
            "low_freq_factor": "rope_beta_slow",
            "high_freq_factor": "rope_beta_fast",
        },
    ),
    "yarn": (
        "yarn",
        {
            "factor": "rope_factor",
            "original_max_position_embeddings": "rope_original_length",
            "beta_slow": "rope_beta_slow",
            "beta_fast": "rope_beta_fast",
            "mscale": "rope_mscale",
            "mscale_all_dim": "rope_mscale_all_dim",
        },
    ),
}
"""`rope_type` to `model.rope_scaling`, and its parameters to `[model]` keys."""
MOST_ENTRIES = 2**13
"""Of `layer_types`: a mixer and a feed-forward for each layer that a recipe may have."""
ROPE_DEFAULTS = {"beta_slow": 1, "beta_fast": 32, "mscale": 0, "mscale_all_dim": 0}
ROPE_FIXED = {"truncate": True, "partial_rotary_factor": 1.0}


def architecture_of(path: Path, config: Config) -> tuple[Family, Architecture]:
    """The family and architecture of a `config.json`. Raises UserError that names the known ones."""
    known = {
        name: (family, a) for family in FAMILIES.values() for a in family.published for name in (a.name, *a.aliases)
    }
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in known:
        raise UserError(f"{path / CONFIG}: architectures = {names!r}: not known here; {nearest(str(name), known)}")
    return known[name]


def read_recipe(path: Path, config: Config) -> Recipe:
    """The recipe that builds the model of a `config.json`.

    Raises UserError that names the key: one that is missing, or whose value means a model that is not built here.
    """
    family, architecture = architecture_of(path, config)
    where = path / CONFIG
    config = _text_part(where, config, architecture)
    for key, value in architecture.fixed.items():
        if config.get(key, value) not in (value, None):
            raise UserError(f"{where}: {key} = {config[key]!r}: not supported; legal: {value!r}")
    tables: Tables = {"model": {"family": family.name, **_layers(where, config, architecture)}, "moe": {}}
    for key, target in architecture.keys.items():
        value = config.get(key)
        if value is None:
            value = architecture.defaults.get(key)
        if value is None:
            value = _derived(key, config)
        if value is None and key == "head_dim":
            continue  # no head counts to divide by: the recipe says which of them is wrong
        if value is None:
            raise UserError(f"{where}: '{key}' is missing")
        _put(tables, target, value)
    for target, value in architecture.implied.items():
        _put(tables, target, value)
    _read_rope(where, config, tables, architecture)
    try:
        if architecture.read is not None:
            architecture.read(config, tables)
        tables["model"]["size"] = _size(family, tables)
        mixers = {name.removeprefix("mixer."): table for name, table in tables.items() if name.startswith("mixer.")}
        return resolve({"model": tables["model"], "moe": tables["moe"], "mixer": mixers, "training": {"steps": 1}})
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def write_config(model: ModelRecipe) -> Config | None:
    """The `config.json` of the published architecture that is this model, or None where there is none.

    What is written is read again and must give the same model: nothing that has no key is lost.
    """
    tables = _tables(model)
    if model.moe.balance == "none":
        tables["moe"]["balance_coefficient"] = 0.0
    for architecture in FAMILIES[model.family].published:
        if architecture.sparse != (model.moe.num_experts > 0) and not architecture.dense:
            continue
        config: Config = {"architectures": [architecture.name], "model_type": architecture.model_type}
        config |= {key: _get(tables, target) for key, target in architecture.keys.items()}
        config |= architecture.fixed
        if architecture.layers:
            words = {mixer: word for word, mixer in architecture.layers.items()}
            full = words.get(FULL, FULL)
            after = {letter: [word] for word, letter in architecture.feed_forwards.items()}
            config["layer_types"] = [
                word
                for mixer, kind in zip(layer_mixers(model), feed_forwards(model), strict=True)
                for word in (words.get(mixer, full), *after.get(kind, ()))
            ]
        _write_rope(tables, config, architecture)
        try:
            if architecture.write is not None:
                architecture.write(tables, config)
            again = read_recipe(Path(), config).model
        except UserError:
            continue
        if _essence(again) == _essence(model):
            return config
    return None


def _essence(model: ModelRecipe) -> dict[str, Any]:
    """What a trained model computes, as flat keys."""
    flat = flatten(model)
    for key in (*UNCHANGED, *(f"moe.{key}" for key in UNCHANGED_MOE)):
        flat.pop(key)
    kinds, _ = feed_forwards(model), flat.pop("feed_forwards")
    selection_bias = flat.pop("moe.selection_bias") or model.moe.balance == "bias"
    if not model.moe.num_experts:
        flat = {key: value for key, value in flat.items() if not key.startswith("moe.")}
    if DENSE not in kinds:
        flat.pop("ffn_hidden_size")
    if model.rope_scaling == "none":
        flat = {key: value for key, value in flat.items() if key == "rope_theta" or not key.startswith("rope_")}
    return flat | {"layers": layer_mixers(model), "kinds": kinds, "selection bias": selection_bias}


def _tables(model: ModelRecipe) -> Tables:
    tables: Tables = {}
    for key, value in flatten(model).items():
        section, _, name = key.rpartition(".")
        tables.setdefault(section.replace("mixer_options", "mixer") or "model", {})[name] = value
    return tables


def _derived(key: str, config: Config) -> Any:
    """What a key means that is left out or null, told by others."""
    heads = config.get("num_attention_heads")
    if key == "num_key_value_heads":
        return heads
    width = config.get("hidden_size")
    if key == "head_dim" and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        return width // heads
    return None


def _text_part(where: Path, config: Config, architecture: Architecture) -> Config:
    """What describes the text model: the nested part, and what stands beside it and not in it, by the usual keys."""
    for key in architecture.nested:
        nested = config.get(key, {})
        if not isinstance(nested, dict):
            raise UserError(f"{where}: {key} = {nested!r}: must be an object")
        config = {**config, **nested}
    usual = {usual: config[other] for other, usual in architecture.synonyms.items() if other in config}
    return {**usual, **config}


def _layers(where: Path, config: Config, architecture: Architecture) -> dict[str, Any]:
    """`model.layout`, the shortest that repeats, `model.mixer` where it has an `L`, and where feed-forwards are entries
    by themselves `model.num_layers` and `model.feed_forwards`."""
    types = config.get("layer_types")
    if types is None and architecture.layer_types is not None:
        try:
            types = architecture.layer_types(config)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from None
    types = types or [FULL]
    words = {FULL: FULL, **architecture.layers}
    legal = [*words, *architecture.feed_forwards]
    if not isinstance(types, list) or any(kind not in legal for kind in types):
        raise UserError(f"{where}: layer_types = {types!r}: not supported; legal: {', '.join(map(repr, legal))}")
    if len(types) > MOST_ENTRIES:
        raise UserError(f"{where}: layer_types: names {len(types)} layers; at most {MOST_ENTRIES}")
    mixers = [words[kind] for kind in types if kind in words]
    linear = {*mixers} - {FULL}
    assert len(linear) <= 1, "one linear mixer an architecture"
    layout, layers = "".join("N" if mixer == FULL else "L" for mixer in mixers), config.get("num_hidden_layers")
    told: dict[str, Any] = {"layout": period(layout), **({"mixer": linear.pop()} if linear else {})}
    if architecture.feed_forwards:
        told |= {"num_layers": len(mixers), "feed_forwards": period(_after_mixers(where, types, architecture))}
        layers = len(types) if layers is None else layers
    if (len(told["layout"]) > 1 or architecture.feed_forwards) and len(types) != layers:
        raise UserError(f"{where}: layer_types: names {len(types)} layers, num_hidden_layers = {layers!r}")
    return told


def _after_mixers(where: Path, types: list[str], architecture: Architecture) -> str:
    """What follows each mixer, as `model.feed_forwards`."""
    kinds: list[str] = []
    for place, kind in enumerate(types):
        letter = architecture.feed_forwards.get(kind)
        if letter is None:
            kinds.append(NONE)
        elif kinds and kinds[-1] == NONE:
            kinds[-1] = letter
        else:
            raise UserError(f"{where}: layer_types[{place}] = {kind!r}: must follow a mixer")
    return "".join(kinds)


def _read_rope(where: Path, config: Config, tables: Tables, architecture: Architecture) -> None:
    """`rope_parameters`, or the older `rope_theta` beside `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters = {rope!r}: must be an object")
    rope = dict(rope)
    model = tables["model"]
    model["rope_theta"] = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    if architecture.rope_switch:
        _put(tables, architecture.rope_switch, model["rope_theta"] is not None)
        model["rope_theta"] = 10000.0 if model["rope_theta"] is None else model["rope_theta"]
    if architecture.rotary is not None:
        target, missing = architecture.rotary
        factor = rope.pop("partial_rotary_factor", config.get("partial_rotary_factor", missing))
        if not isinstance(factor, int | float) or not 0 < factor <= 1:
            raise UserError(f"{where}: partial_rotary_factor = {factor!r}: must be above 0 and at most 1")
        width = model.get("head_dim")
        _put(tables, target, int(width * factor) if isinstance(width, int) and factor < 1 else 0)
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE:
        raise UserError(f"{where}: rope type {kind!r}: not supported; legal: {', '.join(ROPE)}")
    model["rope_scaling"], keys = ROPE[kind]
    for key, target in keys.items():
        value = rope.pop(key, ROPE_DEFAULTS.get(key))
        if value is None and key == "original_max_position_embeddings":
            value = config.get("original_max_position_embeddings", config.get("max_position_embeddings"))
        if value is None:
            raise UserError(f"{where}: rope type {kind!r} needs '{key}'")
        model[target] = value
    for key, value in rope.items():
        if key not in architecture.rope_ignored and value not in (None, ROPE_FIXED.get(key)):
            raise UserError(f"{where}: rope parameter {key} = {value!r}: not supported")


def _write_rope(tables: Tables, config: Config, architecture: Architecture) -> None:
    model = tables["model"]
    kind, keys = next((kind, keys) for kind, (ours, keys) in ROPE.items() if ours == model["rope_scaling"])
    values = {key: model[target] for key, target in keys.items()}
    scaling = {"rope_type": kind, **{k: v for k, v in values.items() if v != ROPE_DEFAULTS.get(k)}}
    if architecture.rotary is not None:
        rotated = _get(tables, architecture.rotary[0])
        scaling["partial_rotary_factor"] = config["partial_rotary_factor"] = (
            rotated / model["head_dim"] if rotated else 1.0
        )
    rotates = not architecture.rope_switch or _get(tables, architecture.rope_switch)
    config["rope_theta"] = model["rope_theta"] if rotates else None
    config["rope_parameters"] = {**scaling, "rope_theta": config["rope_theta"]}
    if keys:  # for transformers before 5
        config["rope_scaling"] = scaling


def _size(family: Family, tables: Tables) -> str:
    """The preset with these dimensions; without one, any: every dimension is given beside it."""
    for size in family.presets:
        preset = family.preset(size)
        if all(
            tables[section].get(key, value) == value for section in preset for key, value in preset[section].items()
        ):
            return size
    return "debug"


def _put(tables: Tables, target: str, value: Any) -> None:
    section, _, key = target.rpartition(".")
    tables.setdefault(section, {})[key] = value


def _get(tables: Tables, target: str) -> Any:
    section, _, key = target.rpartition(".")
    return tables[section][key]
