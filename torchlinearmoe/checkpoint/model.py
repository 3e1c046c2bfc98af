"""Models out of checkpoints, without a trainer: the recipe and the tokenizer travel inside every checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from torchlinearmoe.checkpoint.folder import find_latest
from torchlinearmoe.checkpoint.load import check_fits, load_model_weights
from torchlinearmoe.checkpoint.plain import SMALL, is_there, plain_file, read_plain
from torchlinearmoe.checkpoint.storage import CheckpointError
from torchlinearmoe.checkpoint.tokenizer_files import NEIGHBOURS, TEMPLATE, TOKENIZER, tokenizer_names, without_code
from torchlinearmoe.data.chat_template import Template, load_template, template_of
from torchlinearmoe.data.jinja_template import tokenizer_template
from torchlinearmoe.data.tokenizer import Tokenizer, load_tokenizer
from torchlinearmoe.disk import expanded
from torchlinearmoe.errors import RecipeError, UserError
from torchlinearmoe.initialize import reset_buffers
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.recipe import Recipe, dump, load_recipe
from torchlinearmoe.written import is_checkpoint

RECIPE_FILE = "recipe.toml"
CHECKPOINTS = "checkpoints"
"""Of a run's folder."""
TOKENIZER_FOLDER = "tokenizer"
TEMPLATE_FILES = {"toml": "chat_template.toml", "jinja": TEMPLATE}
SPECIAL_IDS_FILE = "special_ids.json"
"""Of an imported model alone: what its `config.json` and `generation_config.json` said of special ids, by file."""


def model_files(recipe: Recipe, tokenizer: Tokenizer) -> dict[str, str | bytes]:
    """The small files a checkpoint needs to be used by itself, by name. Raises UserError for one that is not plain.

    The tokenizer's are the bytes it was read from; those it has no use for itself are read from beside it now.
    """
    files: dict[str, str | bytes] = {RECIPE_FILE: dump(recipe)}
    neighbours = set[str](NEIGHBOURS if tokenizer.path.name == TOKENIZER else ())
    if recipe.data.format == "messages":
        template = load_template(recipe.data.chat_template, tokenizer)
        files[TEMPLATE_FILES[template.kind]] = template.source
        neighbours.discard(TEMPLATE)  # another than the one it learned
    read = {path.name: path.read_bytes() for path in _neighbours(tokenizer, neighbours)} | dict(tokenizer.files)
    for name, content in read.items():
        files[f"{TOKENIZER_FOLDER}/{name}"] = without_code(content, tokenizer.path.with_name(name))
    return files


def _neighbours(tokenizer: Tokenizer, names: set[str]) -> list[Path]:
    """What of `names` lies beside the tokenizer's file.

    The file itself may be a link, then what lies beside it may lead to the same folder, and nowhere else.
    """
    path = tokenizer.path
    files = [file for file in map(path.with_name, sorted(names)) if file.is_file()]
    homes = {path.parent.resolve(), path.resolve().parent}
    for file in files:
        if file.resolve().parent not in homes:
            raise UserError(f"{file}: is a link to another folder than {path.name}; put the file itself there")
        if file.stat().st_size > SMALL:
            raise UserError(f"{file}: has {file.stat().st_size} bytes, at most {SMALL} are read")
    return files


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint at `path`: itself, or the newest sound one of a run's folder, which logs those it passes over.

    Raises CheckpointError when a run's folder has none.
    """
    path = Path(path)
    if is_checkpoint(path) or not (path / CHECKPOINTS).is_dir():
        return path
    found = find_latest(path / CHECKPOINTS)
    if found is None:
        raise CheckpointError(f"{path / CHECKPOINTS}: holds no complete checkpoint yet")
    return found


def checkpoint_recipe(path: str | Path) -> Recipe:
    """The recipe a checkpoint was trained with.

    Raises CheckpointError when `path` is not a checkpoint, RecipeError that names the file when it cannot be read.
    """
    if not is_there(Path(path) / RECIPE_FILE):
        raise CheckpointError(
            f"{path}: not a checkpoint (no {RECIPE_FILE}); name a run's folder or its checkpoints/step-N"
        )
    file = plain_file(path, RECIPE_FILE)
    try:
        return load_recipe(file)
    except RecipeError as error:
        told = str(error)
        raise RecipeError(told if told.startswith(str(file)) else f"{file}: {told}") from None


def checkpoint_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer a checkpoint was trained with, with documents that start as they did."""
    found = find_tokenizer(path)
    if found is None:
        raise CheckpointError(f"{Path(path) / TOKENIZER_FOLDER}: holds no tokenizer.json and no tiktoken file")
    return load_tokenizer(found).starting(_begins(Path(path)))


def _begins(path: Path) -> bool | None:
    """Whether documents started with the begin-of-text token in training; None for as the tokenizer's files say.

    So it is for an imported model, which was trained elsewhere. Checkpoints of earlier versions say nothing: they never
    did.
    """
    return None if is_there(path / SPECIAL_IDS_FILE) else bool(checkpoint_recipe(path).data.begin_of_text)


def begins_as_trained(path: str | Path, tokenizer: Tokenizer) -> bool | None:
    """Whether documents of this tokenizer start with its begin-of-text token in what the weights at `path` know.

    None for as the tokenizer's files say: in a Hugging Face directory, an imported model, or under another tokenizer.
    """
    path = expanded(path, "checkpoint.init_from")
    if not is_there(path / RECIPE_FILE) or (found := find_tokenizer(path)) is None:
        return None
    return _begins(path) if load_tokenizer(found).fingerprint == tokenizer.fingerprint else None


def ends_of_text(path: str | Path, tokenizer: Tokenizer) -> set[int]:
    """The ids after which generation stops: the end-of-text token, and those that an imported model's files name.

    Raises UserError where they name something else than ids.
    """
    ends = {tokenizer.end_of_text}
    if is_there(Path(path) / SPECIAL_IDS_FILE):
        for ids in read_special_ids(path).values():
            named = ids.get("eos_token_id")
            ends |= set(named if isinstance(named, list) else [] if named is None else [named])
    return ends


def read_special_ids(path: str | Path) -> dict[str, dict[str, Any]]:
    """What an imported model's files said of special ids, by file. Raises UserError."""
    found = read_table(path, SPECIAL_IDS_FILE)
    where = Path(path) / SPECIAL_IDS_FILE
    for ids in found.values():
        if not isinstance(ids, dict):
            raise UserError(f"{where}: must hold an object a file; import the model again")
        ends = ids.get("eos_token_id")
        if not all(type(end) is int for end in (ends if isinstance(ends, list) else [ends]) if end is not None):
            raise UserError(f"{where}: eos_token_id = {ends!r}: must be an id or a list of ids; import the model again")
    return found


def read_table(path: str | Path, name: str) -> dict[str, Any]:
    """The JSON object in the plain file `name` of a folder. Raises UserError."""
    try:
        table = json.loads(read_plain(path, name))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{Path(path) / name}: not JSON: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"{Path(path) / name}: not a JSON object")
    return table


def find_tokenizer(path: str | Path) -> Path | None:
    """The tokenizer's file in a checkpoint or a Hugging Face directory, if there is one.

    Raises UserError when it, or what it is read with, is not a plain file there.
    """
    for folder in (TOKENIZER_FOLDER, ""):
        for name in tokenizer_names(Path(path), folder):
            if name.endswith((TOKENIZER, ".tiktoken")):
                return Path(path) / name
    return None


def checkpoint_template(path: str | Path) -> Template:
    """The chat template a checkpoint was finetuned with.

    Of one that was not it is the one that came with its tokenizer, as that of an imported model; else `chatml`.
    """
    for kind, name in TEMPLATE_FILES.items():
        file = Path(path) / name
        if is_there(file):
            try:
                return template_of(kind, read_plain(path, name).decode(), str(file))
            except UnicodeDecodeError as error:
                raise UserError(f"{file}: not a {kind.upper()} file: byte {error.start} is not UTF-8") from None
    found = find_tokenizer(path)
    return found and tokenizer_template(load_tokenizer(found)) or load_template("chatml")


def load_model(path: str | Path) -> Decoder:
    """The model of a training checkpoint, saved under any layout, in float32 on the default device, in eval mode.

    Raises CheckpointError, one line, when `path` is not a complete checkpoint.
    """
    recipe = checkpoint_recipe(path)
    with torch.device("meta"):
        model = Decoder(recipe.model)
    check_fits(path, model)
    model.to_empty(device=torch.get_default_device())
    reset_buffers(model)
    load_model_weights(path, model)
    return model.eval()
