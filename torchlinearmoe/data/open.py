"""What `[data]` names, opened."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchlinearmoe.data.chat import Chat
from torchlinearmoe.data.chat_template import load_template
from torchlinearmoe.data.conversations import open_conversations
from torchlinearmoe.data.mixture import MixedStream
from torchlinearmoe.data.prepare import Tell
from torchlinearmoe.data.recall import open_recall
from torchlinearmoe.data.shared import Decide, alone
from torchlinearmoe.data.splits import Splits, TokenStream, check_not_empty, open_splits
from torchlinearmoe.data.tokenizer import Tokenizer
from torchlinearmoe.errors import RecipeError
from torchlinearmoe.recipe.schema import DataRecipe


def open_data(
    data: DataRecipe,
    tokenizer: Tokenizer,
    cache: Path,
    run_folder: Path | None = None,
    decide: Decide = alone,
    tell: Tell | None = None,
) -> Splits[Any]:
    """The two splits of a recipe's data, tokenised into `data.cache`, else into `cache`. Raises UserError.

    `run_folder` is where the run writes, `decide` picks the rank that finds and tokenises the data for all; `tell` is
    called with (done, total) in bytes of text meanwhile.
    """
    if data.format == "recall":
        return open_recall(data)
    where: dict[str, Any] = {
        "tokenizer": tokenizer,
        "begins": data.begin_of_text,
        "cache": data.cache or cache,
        "run_folder": run_folder,
        "decide": decide,
        "min_length": data.min_length,
        "packing": data.packing,
        "tell": tell,
    }
    if data.format == "text":
        where["text_key"] = data.text_key
    if data.sources:
        splits = _open_sources(data, where)
    else:
        splits = _open_paths(data, data.paths, data.validation_fraction, where)
    where["begins"] = splits.begin_of_text is not None
    others = dict(splits.others)
    for name, path in named(data.validation_paths, "data.validation_paths").items():
        others[name] = _open_paths(data, [path], 0, {**where, "min_length": 0}).train
    return replace(splits, others=others)


def _open_paths(data: DataRecipe, paths: Sequence[str], fraction: float, where: dict[str, Any]) -> Splits[Any]:
    if data.format == "messages":
        chat = Chat(load_template(data.chat_template, where["tokenizer"]), data.trained_roles)
        return open_conversations(paths, chat=chat, validation_fraction=fraction, **where)
    split = data.validation_split if fraction else "documents"
    return open_splits(paths, split=split, validation_fraction=fraction, **where)


def _open_sources(data: DataRecipe, where: dict[str, Any]) -> Splits[Any]:
    """A mixture: each source opened by itself, and held out as its `split` says."""
    names = named([source.path for source in data.sources], "data.sources", whole=True)
    trained: dict[str, TokenStream] = {}
    weights, stores, held_out, left_out, others = [], [], [], [], {}
    unknown: Counter[str] = Counter()
    how: dict[str, Any] = {"min_length": data.min_length, "packing": data.packing}
    for name, source in zip(names, data.sources):
        opened = open_splits([source.path], validation_fraction=0, **{**where, "min_length": 0})
        where = {**where, "begins": opened.stores[0].begin_of_text is not None}
        left_out += opened.left_out
        unknown.update(opened.unknown)
        stores += opened.stores
        if source.split == "validation":
            others[name] = TokenStream(opened.stores, **how)
            continue
        bound = int(data.validation_fraction * 2**64) if source.split == "both" else 0
        trained[name] = TokenStream(opened.stores, (bound, 1 << 64), **how)
        weights.append(source.weight)
        if bound:
            held_out += opened.stores
        if not trained[name].num_documents:
            short = f"lower data.min_length = {data.min_length}, or " if trained[name].left_out else ""
            raise RecipeError(
                f"data.sources: nothing of '{source.path}' is left to train on; {short}set its split = 'train'"
            )
    bound = int(data.validation_fraction * 2**64) if held_out else 0
    validation = TokenStream(held_out or stores[:1], (0, bound), **how)
    splits: Splits[Any] = Splits(
        MixedStream(trained, weights), validation, tuple(stores), others, tuple(left_out), unknown
    )
    check_not_empty(splits, data.validation_fraction if held_out else 0)
    return splits


def named(entries: Sequence[str], key: str, whole: bool = False) -> dict[str, str]:
    """Paths by their names: `NAME=PATH`, else the last part of the path. `whole`: there are no such names in front.

    Raises RecipeError where two have the same.
    """
    found: dict[str, str] = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if whole or not equals or "/" in name:
            name, path = Path(entry).name.partition(".")[0], entry
        name = re.sub(r"[^\w-]+", "", name) or "data"
        if name in found:
            if not whole:
                raise RecipeError(f"{key}: two are called '{name}'; name them apart: 'NAME={path}'")
            name = f"{name}-{sum(known.rpartition('-')[0] == name for known in found) + 2}"
        found[name] = path
    return found
