"""Models out of checkpoints, without a trainer: the recipe and the tokenizer travel inside every checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from torchlinearmoe.checkpoint.load import check_fits, load_model_weights
from torchlinearmoe.checkpoint.plain import SMALL, is_there, plain_file, read_plain
from torchlinearmoe.checkpoint.storage import CheckpointError
from torchlinearmoe.checkpoint.tokenizer_files import NEIGHBOURS, TOKENIZER, tokenizer_names, without_code
from torchlinearmoe.data.chat_template import ChatTemplate, load_template, parse_template
from torchlinearmoe.data.tokenizer import Tokenizer, load_tokenizer
from torchlinearmoe.errors import UserError
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.recipe import Recipe, dump, load_recipe

RECIPE_FILE = "recipe.toml"
TOKENIZER_FOLDER = "tokenizer"
TEMPLATE_FILE = "chat_template.toml"


def model_files(recipe: Recipe, tokenizer: Tokenizer) -> dict[str, str | bytes]:
    """The small files a checkpoint needs to be used by itself, by name. Raises UserError for one that is not plain."""
    files: dict[str, str | bytes] = {RECIPE_FILE: dump(recipe)}
    neighbours = set[str](NEIGHBOURS)
    if recipe.data.format == "messages":
        files[TEMPLATE_FILE] = load_template(recipe.data.chat_template).source
        neighbours.remove("chat_template.jinja")  # another than the one it learned
    for path in _tokenizer_files(tokenizer, neighbours):
        files[f"{TOKENIZER_FOLDER}/{path.name}"] = without_code(path.read_bytes(), path)
    return files


def _tokenizer_files(tokenizer: Tokenizer, neighbours: set[str]) -> list[Path]:
    """The tokenizer's file and what lies beside it: `neighbours` of a tokenizer.json, the names of a tiktoken file.

    The file itself may be a link, then what lies beside it may lead to the same folder, and nowhere else.
    """
    path = tokenizer.path
    names = sorted(neighbours) if path.name == TOKENIZER else [f"{path.name}.json"]
    files = [file for file in map(path.with_name, names) if file.is_file()]
    homes = {path.parent.resolve(), path.resolve().parent}
    for file in files:
        if file.resolve().parent not in homes:
            raise UserError(f"{file}: is a link to another folder than {path.name}; put the file itself there")
        if file.stat().st_size > SMALL:
            raise UserError(f"{file}: has {file.stat().st_size} bytes, at most {SMALL} are read")
    return [path, *files]


def checkpoint_recipe(path: str | Path) -> Recipe:
    """The recipe a checkpoint was trained with. Raises CheckpointError when `path` is not a checkpoint."""
    if not is_there(Path(path) / RECIPE_FILE):
        raise CheckpointError(f"{path}: not a checkpoint (no {RECIPE_FILE}); name a folder checkpoints/step-N of a run")
    return load_recipe(plain_file(path, RECIPE_FILE))


def checkpoint_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer a checkpoint was trained with."""
    found = find_tokenizer(path)
    if found is None:
        raise CheckpointError(f"{Path(path) / TOKENIZER_FOLDER}: holds no tokenizer.json and no tiktoken file")
    return load_tokenizer(found)


def find_tokenizer(path: str | Path) -> Path | None:
    """The tokenizer's file in a checkpoint or a Hugging Face directory, if there is one.

    Raises UserError when it, or what it is read with, is not a plain file there.
    """
    for folder in (TOKENIZER_FOLDER, ""):
        for name in tokenizer_names(Path(path), folder):
            if name.endswith((TOKENIZER, ".tiktoken")):
                return Path(path) / name
    return None


def checkpoint_template(path: str | Path) -> ChatTemplate:
    """The chat template a checkpoint was finetuned with; `chatml` for one that was not."""
    file = Path(path) / TEMPLATE_FILE
    if not is_there(file):
        return load_template("chatml")
    try:
        return parse_template(read_plain(path, TEMPLATE_FILE).decode(), str(file))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not a TOML file: byte {error.start} is not UTF-8") from None


def load_model(path: str | Path) -> Decoder:
    """The model of a training checkpoint, saved under any layout, in float32 on the default device, in eval mode.

    Raises CheckpointError, one line, when `path` is not a complete checkpoint.
    """
    recipe = checkpoint_recipe(path)
    with torch.device("meta"):
        model = Decoder(recipe.model)
    check_fits(path, model)
    model.to_empty(device=torch.get_default_device())
    for module in model.modules():
        reset = getattr(module, "reset_buffers", None)
        if reset is not None:
            reset()
    load_model_weights(path, model)
    return model.eval()
