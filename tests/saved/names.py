"""Every name that a checkpoint, an optimizer or a recipe may hold, and by which rule it has its shape or value.

    python tests/saved/names.py          writes new names down; refuses where a known one vanished or changed

`names.json` holds a group a mixer (with its options), family, optimizer and recipe. Shapes are those of two
widths, so that 64 from the width is told from 64 from the heads;
`*.x` are `layers.0.x`, `layers.1.x` and so on of every layer, `layers.0,2.x` of these two. Buffers that are not saved
have no name here.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchlinearmoe.errors import RecipeError
from torchlinearmoe.families import FAMILIES
from torchlinearmoe.kernels.operator import legal_names, operators
from torchlinearmoe.mixers import MIXERS
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.optim.build import OPTIMIZERS, build_optimizer
from torchlinearmoe.recipe import resolve
from torchlinearmoe.recipe.parse import NESTED, SECTIONS

RECORDED = Path(__file__).with_name("names.json")
RECORD = "python tests/saved/names.py"
WIDTHS = (64, 96)
GONE = "none"
LAYER = re.compile(r"layers\.(\d+)\.")

Group = dict[str, str]
"""Name to rule."""

FORMS: dict[str, dict[str, dict[str, Any]]] = {
    "": {},
    " tied": {"model": {"tie_embeddings": True}},
    " dense": {"moe": {"num_experts": 0}},
    " shared and biased": {"moe": {"shared_hidden_size": 48, "shared_gate": True, "balance": "bias"}},
}
"""What changes a family's names."""
LIKE = {"minimax": "mixtral", "olmo_hybrid": "llama3", "qwen3_5_moe": "qwen3_next", "bailing_hybrid": "kimi_linear"}
"""Families whose names are those of another, but for what their groups say."""


def groups() -> dict[str, Group]:
    """Everything there is today."""
    return {**_mixers(), **_families(), **_optimizers(), "recipe": _recipe_keys()}


def _mixers() -> dict[str, Group]:
    """Two layers of each mixer, by itself and with each of its variants; the names around it are a family's."""
    found: dict[str, Group] = {}
    for name in MIXERS.names():
        for options in ({}, *MIXERS[name].variants):
            told = " ".join([name, *(f"{key}={value}" for key, value in options.items())])
            families = (each for each in FAMILIES if FAMILIES[each].attention == name and each not in LIKE)
            family = min(families, key=lambda each: len(FAMILIES[each].attention_options("debug")), default="qwen2")
            model = {"family": family, "mixer": name, "layout": "L", "num_layers": 2, "num_heads": 2, "num_kv_heads": 2}
            names = _shapes({"model": model, "mixer": {name: options}})
            own = {key: rule for key, rule in names.items() if ".mixer." in key or key.startswith("shared.")}
            found[f"mixer {told}"] = _beside(own, found.get(f"mixer {name}", {}))
    return found


def _families() -> dict[str, Group]:
    """The `debug` size of each family in softmax layers, and its forms; of one in LIKE what differs from the other."""
    found: dict[str, Group] = {}
    for name in FAMILIES:
        for form, changes in FORMS.items():
            if not form or FAMILIES[name].preset("debug")["moe"]["num_experts"] or "moe" not in changes:
                plain = found.get(f"family {name}", {})
                if name in LIKE:
                    plain = _shapes(_of_family(LIKE[name], changes))
                found[f"family {name}{form}"] = _beside(_shapes(_of_family(name, changes)), plain)
    return found


def _of_family(name: str, changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    model = {"family": name, "layout": "N", **changes.get("model", {})}
    return {"model": model, "moe": changes.get("moe", {})}


def _beside(names: Group, plain: Group) -> Group:
    """What options change of the names without them: other shapes, other names, and which there are no more."""
    gone = {name: GONE for name in plain if name not in names}
    return {name: rule for name, rule in names.items() if plain.get(name) != rule} | gone


def _shapes(tables: dict[str, dict[str, Any]]) -> Group:
    """What a model saves: the shapes, and what is a buffer, at each width at which the options are legal."""
    rules: dict[str, list[str]] = {}
    for width in WIDTHS:
        sized = {**tables, "model": {**tables["model"], "hidden_size": width}, "training": {"steps": 1}}
        try:
            recipe = resolve(sized)
        except RecipeError:
            assert width != WIDTHS[0]
            continue
        with torch.device("meta"):
            model = Decoder(recipe.model)
        for name, value in model.state_dict().items():
            rules.setdefault(name, [_kind(model, name, value)]).append("x".join(map(str, value.shape)) or "a number")
    return _over_layers({name: f"{kind}{', '.join(shapes)}" for name, (kind, *shapes) in rules.items()})


def _over_layers(names: Group) -> Group:
    """`layers.0.x` and `layers.1.x` of one rule as `layers.0,1.x`, or as `*.x` where these are all."""
    layers: dict[tuple[str, str], list[str]] = {}
    for name, rule in names.items():
        layer = LAYER.match(name)
        numbers = layers.setdefault((LAYER.sub("{}", name), rule), [])
        numbers += [layer[1]] if layer else []
    every = max(map(len, layers.values()))  # each has a norm
    told = (("*." if len(numbers) == every else f"layers.{','.join(numbers)}.") for numbers in layers.values())
    return {name.format(where): rule for (name, rule), where in zip(layers, told)}


def _kind(model: nn.Module, name: str, value: Tensor) -> str:
    kind = "" if name in dict(model.named_parameters(remove_duplicate=False)) else "buffer "
    return kind if value.dtype == torch.float32 else f"{kind}{value.dtype} ".replace("torch.", "")


def _optimizers() -> dict[str, Group]:
    """What each keeps of a parameter after a step."""
    found: dict[str, Group] = {}
    for name in OPTIMIZERS:
        layer = nn.Linear(3, 2)
        optimizer = build_optimizer(layer, name=name, lr=1e-3)
        layer(torch.ones(3)).sum().backward()
        optimizer.step()
        state = optimizer.state[layer.weight]
        found[f"optimizer {name}"] = {
            key: "as its parameter" if value.shape == layer.weight.shape else f"{list(value.shape)}"
            for key, value in state.items()
        }
    return found


def _recipe_keys() -> Group:
    """The type and default of every key, and what those may say that name a backend."""
    classes = {**SECTIONS, **{f"mixer.{name}": MIXERS[name].Options for name in MIXERS.names()}}
    entries = {
        f"{section}.{entry.name}": entry
        for section, cls in classes.items()
        for entry in dataclasses.fields(cls)
        if entry.name not in NESTED
    }
    backends = {operator.key for operator in operators().values()}
    return {key: f"{entry.type}{_default(entry)}" for key, entry in entries.items()} | {
        f"{key} = {name!r}": "legal"
        for key, entry in entries.items()
        if key in backends and entry.type == "str"
        for name in legal_names(key)
    }


def _default(entry: dataclasses.Field[Any]) -> str:
    return "" if entry.default is dataclasses.MISSING else f" = {entry.default!r}"


def read() -> dict[str, Group]:
    """What was written down."""
    return json.loads(RECORDED.read_text()) if RECORDED.exists() else {}


def lost(group: str, recorded: Group, now: Group) -> Iterator[str]:
    """A line for every known name that is gone or means something else."""
    mend = f"convert what older versions saved, then take its line out of {RECORDED.name} and run: {RECORD}"
    for name, rule in recorded.items():
        if name not in now:
            yield f"{group}: {name} ({rule}) vanished: {mend}"
        elif now[name] != rule:
            yield f"{group}: {name} is {now[name]}, was {rule}: {mend}"


def new(group: str, recorded: Group, now: Group) -> Iterator[str]:
    """A line for every name that is not known yet."""
    for name in now:
        if name not in recorded:
            yield f"{group}: {name} is new; write it down: {RECORD}"


def main() -> int:
    """The command; returns the exit status."""
    recorded, now = read(), groups()
    problems = [line for group, names in recorded.items() for line in lost(group, names, now.get(group, {}))]
    for line in problems:
        print(line)
    if problems:
        return 1
    for group, names in now.items():
        for line in new(group, recorded.get(group, {}), names):
            print(line.partition(";")[0])
    RECORDED.write_text(json.dumps(now, indent=0, separators=(",", ":")) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
