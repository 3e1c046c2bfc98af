"""Models out of checkpoints, without a trainer: the recipe and the tokenizer travel inside every checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from torchlinearmoe.checkpoint.load import load_model_weights
from torchlinearmoe.checkpoint.storage import CheckpointError
from torchlinearmoe.data.chat_template import ChatTemplate, load_template, parse_template
from torchlinearmoe.data.tokenizer import Tokenizer, load_tokenizer
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.recipe import Recipe, dump, load_recipe

RECIPE_FILE = "recipe.toml"
TOKENIZER_FOLDER = "tokenizer"
TEMPLATE_FILE = "chat_template.toml"
SPECIAL_IDS_FILE = "special_ids.json"
"""Of an imported model alone: what its `config.json` and `generation_config.json` said of special ids, by file."""


def model_files(recipe: Recipe, tokenizer: Tokenizer) -> dict[str, str | bytes]:
    """The small files a checkpoint needs to be used by itself, by name.

    The tokenizer's are the bytes it was read from; those it has no use for itself are read from beside it now.
    """
    files: dict[str, str | bytes] = {RECIPE_FILE: dump(recipe)}
    beside = ["special_tokens_map.json", "tokenizer_config.json"] if tokenizer.path.name == "tokenizer.json" else []
    if recipe.data.format == "messages":
        files[TEMPLATE_FILE] = load_template(recipe.data.chat_template).source
    elif beside:
        beside.append("chat_template.jinja")  # with messages, it learned another
    read = {path.name: path.read_bytes() for path in map(tokenizer.path.with_name, beside) if path.is_file()}
    files |= {f"{TOKENIZER_FOLDER}/{name}": content for name, content in (read | dict(tokenizer.files)).items()}
    return files


def checkpoint_recipe(path: str | Path) -> Recipe:
    """The recipe a checkpoint was trained with. Raises CheckpointError when `path` is not a checkpoint."""
    file = Path(path) / RECIPE_FILE
    if not file.is_file():
        raise CheckpointError(f"{path}: not a checkpoint (no {RECIPE_FILE}); name a folder checkpoints/step-N of a run")
    return load_recipe(file)


def checkpoint_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer a checkpoint was trained with."""
    found = find_tokenizer(path)
    if found is None:
        raise CheckpointError(f"{Path(path) / TOKENIZER_FOLDER}: holds no tokenizer.json and no tiktoken file")
    return load_tokenizer(found)


def begin_of_text(path: str | Path, tokenizer: Tokenizer) -> int:
    """The id that a text begins with: the end-of-text token, which training puts before every document.

    An imported model was trained elsewhere: its tokenizer's `bos_token`, if it has one and adds it.
    """
    config = Path(path) / TOKENIZER_FOLDER / "tokenizer_config.json"
    if not (Path(path) / SPECIAL_IDS_FILE).is_file() or not config.is_file():
        return tokenizer.end_of_text
    described = json.loads(config.read_text(encoding="utf-8"))
    token = described.get("bos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token is None or described.get("add_bos_token") is False:
        return tokenizer.end_of_text
    return tokenizer.special_tokens.get(token, tokenizer.end_of_text)


def find_tokenizer(path: str | Path) -> Path | None:
    """The tokenizer's file in a checkpoint or a Hugging Face directory, if there is one."""
    for folder in (Path(path) / TOKENIZER_FOLDER, Path(path)):
        for pattern in ("tokenizer.json", "*.tiktoken"):
            for file in sorted(folder.glob(pattern)):
                return file
    return None


def checkpoint_template(path: str | Path) -> ChatTemplate:
    """The chat template a checkpoint was finetuned with; `chatml` for one that was not."""
    file = Path(path) / TEMPLATE_FILE
    return parse_template(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else load_template("chatml")


def load_model(path: str | Path) -> Decoder:
    """The model of a training checkpoint, saved under any layout, in float32 on the default device, in eval mode.

    Raises CheckpointError, one line, when `path` is not a complete checkpoint.
    """
    recipe = checkpoint_recipe(path)
    with torch.device("meta"):
        model = Decoder(recipe.model)
    model.to_empty(device=torch.get_default_device())
    for module in model.modules():
        reset = getattr(module, "reset_buffers", None)
        if reset is not None:
            reset()
    load_model_weights(path, model)
    return model.eval()
