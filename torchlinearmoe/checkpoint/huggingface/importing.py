"""A Hugging Face directory into a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

from torchlinearmoe.checkpoint.boxes import Index, cut
from torchlinearmoe.checkpoint.huggingface.directory import read_special_ids
from torchlinearmoe.checkpoint.huggingface.weights import PublishedWeights
from torchlinearmoe.checkpoint.model import RECIPE_FILE, SPECIAL_IDS_FILE, TOKENIZER_FOLDER
from torchlinearmoe.checkpoint.plain import is_there, read_plain
from torchlinearmoe.checkpoint.stream import Progress, write_weights
from torchlinearmoe.checkpoint.tokenizer_files import TEMPLATE, read_tokenizer_file, tokenizer_names
from torchlinearmoe.recipe import Recipe, dump

logger = logging.getLogger(__name__)
BOX_BYTES = 2**23
"""About the most that is read and written at once."""


def import_directory(source: str | Path, destination: str | Path, progress: Progress | None = None) -> Recipe:
    """Write the checkpoint `destination` from the directory `source`; returns its recipe.

    Weights keep the directory's type, the tokenizer's files and the special ids come along. Tensors are read one at a
    time. Raises UserError, one line, and leaves nothing behind, when `source` is not sound or `destination` exists.
    """
    destination = Path(destination)
    weights = PublishedWeights(source)
    for line in weights.left_out():
        logger.warning("%s", line)
    boxes = {name: _boxes(weights, name) for name in weights.copies}
    names = tokenizer_names(weights.path)
    recipe = _recipe_of(weights.recipe, destination, names)
    special_ids = json.dumps(read_special_ids(weights.path), indent=2) + "\n"
    files: dict[str, str | bytes] = {RECIPE_FILE: dump(recipe), SPECIAL_IDS_FILE: special_ids}
    files |= {f"{TOKENIZER_FOLDER}/{name}": read_tokenizer_file(weights.path, name) for name in names}
    if TEMPLATE not in names and is_there(weights.path / TEMPLATE):  # of an export whose tokenizer is tiktoken's
        files[TEMPLATE] = read_plain(weights.path, TEMPLATE)
    write_weights(destination, weights, boxes, files, progress)
    return recipe


def _boxes(weights: PublishedWeights, name: str) -> list[tuple[Index, Index]]:
    """In what pieces a tensor is read and kept: one expert at a time where the directory has them so."""
    shape, copies = weights.shapes[name], weights.copies[name]
    whole = [(copy.start, copy.shape) for copy in copies] if len(shape) == 3 else [((0,) * len(shape), shape)]
    limit = BOX_BYTES // weights.dtypes[name].itemsize
    return [piece for box in whole for piece in cut(*box, limit)]


def _recipe_of(recipe: Recipe, destination: Path, files: list[str]) -> Recipe:
    """The model's recipe with the tokenizer that lies in the checkpoint."""
    known = [name for name in files if name == "tokenizer.json" or name.endswith(".tiktoken")]
    tokenizer = str(destination / TOKENIZER_FOLDER / known[0]) if known else ""
    data = dataclasses.replace(recipe.data, tokenizer=tokenizer)
    training = dataclasses.replace(recipe.training, output_dir=f"runs/{destination.name}")
    return dataclasses.replace(recipe, data=data, training=training)
