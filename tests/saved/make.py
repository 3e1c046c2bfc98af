"""Makes what lies here: what a run, a conversion and a recipe leave behind, and beside each what is to be read in it.

    python tests/saved/make.py FOLDER                            all of it, into another folder
    python tests/saved/make.py --only checkpoints/NEW_MIXER      one more, here

What is here was written by earlier versions, so nothing here is made again: a name that exists is refused.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "distributed"))

from harness import RankPool
from saved_recipes import RECIPES, keys_at_their_default
from saved_run import (
    CASES,
    HERE,
    LAYOUTS,
    SAVED_AT,
    STEP,
    TEXT,
    expected,
    figures,
    logits_of,
    pack,
    resumed,
    tables,
    train,
    unpack,
)

from torchlinearmoe.convert import main as convert
from torchlinearmoe.data.open import open_data
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.recipe import resolve
from torchlinearmoe.recipe.parse import flatten
from torchlinearmoe.run_folder import write_recipe
from torchlinearmoe.runtime import process_group

EXPORTS = {"llama3": "llama3-tied", "mixtral": "mixtral-softmax_attention", "own": "qwen2-hgrn2-LLLN"}
"""Hugging Face directories by the checkpoint that they are made of."""
TOKENS = {"text": "hgrn2", "messages": "llama3-messages"}
"""Token folders by the checkpoint whose run read them."""
IMPORTED = {"llama3": "llama3"}
"""Checkpoints without a run by the directory that they are made of."""
NAMES = [
    *(f"checkpoints/{name}" for name in CASES),
    *(f"tokens/{name}" for name in TOKENS),
    *(f"exports/{name}" for name in EXPORTS),
    *(f"imported/{name}" for name in IMPORTED),
    *(f"recipes/{name}" for name in RECIPES),
]


@cache
def ranks() -> RankPool:
    """The processes of all layouts; they end with this one."""
    return RankPool()


def write_expected(path: Path, found: dict[str, Any]) -> None:
    """A line a key."""
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
    path.write_text(f"{{\n{lines}\n}}\n")


def make_checkpoint(name: str, where: Path, work: Path) -> None:
    """Train in the case's layout, keep the checkpoint in the middle, and write down how one process goes on from it."""
    layout, recipe = CASES[name][0], tables(name)
    shutil.copytree(TEXT, work, dirs_exist_ok=True)
    size, _ = LAYOUTS[layout]
    if size == 1:
        with process_group(torch.device("cpu")):
            lines = train(0, str(work), recipe, fresh=True)
    else:
        (lines, *_) = ranks()(size, train, str(work), recipe, True)
    pack(work, where.with_suffix(".tar.xz"), STEP)
    shutil.rmtree(work / "run")
    found = figures(resumed(unpack(where.with_suffix(".tar.xz"), work), recipe))
    whole = figures([line for line in lines if line["step"] > SAVED_AT])
    for key, values in whole.items():
        torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(values), rtol=1e-5, atol=0)
    write_expected(where.with_suffix(".json"), {"layout": layout, **found, "logits": logits_of(work / STEP)})


def make_tokens(name: str, where: Path, work: Path) -> None:
    """The text of `text/` as a run of the case keeps it."""
    shutil.copytree(TEXT, work, dirs_exist_ok=True)
    told = tables(TOKENS[name])["data"]
    paths = {key: str(work / told[key]) for key in ("tokenizer", "chat_template") if "." in told.get(key, "")}
    data_table = {**told, **paths, "paths": [str(work / path) for path in told["paths"]]}
    data = resolve({"data": data_table, "training": {"steps": 1}}).data
    with process_group(torch.device("cpu")):
        splits = open_data(data, load_tokenizer(data.tokenizer), work / "cache")
    (folder,) = (work / "cache").iterdir()
    shutil.copytree(folder, work / "tokens")
    pack(work, where.with_suffix(".tar.xz"), "tokens")
    sample = splits.train.samples(48)[1]
    found = {"train": splits.train.num_documents, "validation": splits.validation.num_documents}
    rows = {"tokens": sample.tokens.tolist(), "labels": sample.labels.tolist(), "starts": list(sample.starts)}
    write_expected(where.with_suffix(".json"), {**found, **rows})


def make_export(name: str, where: Path, work: Path) -> None:
    """What `convert to-hf` makes of a saved checkpoint."""
    source = where.parents[1] / "checkpoints" / f"{EXPORTS[name]}.tar.xz"
    unpack(source, work)
    assert convert(["to-hf", str(work / STEP), str(work / "exported")]) == 0
    pack(work, where.with_suffix(".tar.xz"), "exported")
    write_expected(where.with_suffix(".json"), {"logits": expected(source)["logits"]})


def make_imported(name: str, where: Path, work: Path) -> None:
    """What `convert from-hf` makes of a saved directory."""
    source = where.parents[1] / "exports" / f"{IMPORTED[name]}.tar.xz"
    unpack(source, work)
    assert convert(["from-hf", str(work / "exported"), str(work / "imported")]) == 0
    written = work / "imported" / "recipe.toml"
    written.write_text(written.read_text().replace(f"{work}/", ""))
    pack(work, where.with_suffix(".tar.xz"), "imported")
    write_expected(where.with_suffix(".json"), {"logits": expected(source)["logits"]})


def make_recipe(name: str, where: Path, work: Path) -> None:
    """A recipe as a run writes it, and the value of every key."""
    assert not keys_at_their_default(), f"give them another value: {', '.join(keys_at_their_default())}"
    recipe = resolve(RECIPES[name])
    write_recipe(recipe, work)
    shutil.copy(work / "recipe.toml", where.with_suffix(".toml"))
    sections = tomllib.loads((work / "recipe.toml").read_text())
    written = {*sections, *(f"mixer.{name}" for name in sections.get("mixer", {}))}
    found = {key: value for key, value in flatten(recipe).items() if key.rpartition(".")[0] in written}
    write_expected(where.with_suffix(".json"), found)


MAKERS = {
    "checkpoints": make_checkpoint,
    "tokens": make_tokens,
    "exports": make_export,
    "imported": make_imported,
    "recipes": make_recipe,
}


def make(names: Sequence[str], destination: Path) -> None:
    """Make the artefacts of these names."""
    for full in names:
        kind, name = full.split("/")
        (destination / kind).mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory() as work:
            MAKERS[kind](name, destination / kind / name, Path(work))
        print(full, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python tests/saved/make.py", description="Make small saved runs.")
    parser.add_argument("folder", nargs="?", type=Path, default=HERE, help="where to; default: here")
    parser.add_argument("--only", action="append", choices=NAMES, metavar="NAME", help=f"one of {', '.join(NAMES)}")
    options = parser.parse_args(arguments)
    names = options.only or NAMES
    here = [name for name in names if any(options.folder.glob(f"{name}.*"))]
    if here:
        print(f"{options.folder} has {', '.join(here)}: what was saved stays; name another folder, or others by --only")
        return 1
    make(names, options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
