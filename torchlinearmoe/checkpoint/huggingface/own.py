"""This project's own Hugging Face architecture: any model, under its own tensor names.

`config.json` carries the recipe's model; its `auto_map` points to `modeling_torchlinearmoe.py` beside it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

import torch

from torchlinearmoe.checkpoint.boxes import Copy, Index, whole
from torchlinearmoe.errors import UserError
from torchlinearmoe.families.huggingface import Config
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.module import traits
from torchlinearmoe.recipe import ModelRecipe, Recipe, RecipeError, dump, resolve

MODELING = "modeling_torchlinearmoe.py"
ARCHITECTURE, CONFIG_CLASS = "TorchLinearMoEForCausalLM", "TorchLinearMoEConfig"
MODEL_TYPE = "torchlinearmoe"
MODEL_SECTIONS = ("model", "moe", "mixer")
"""What of a recipe is the model; paths, folders and the like are the reader's own."""
PREFIX = "model."
"""What transformers' module puts before the decoder's names."""


def own_config(recipe: Recipe) -> Config:
    """`config.json` of any model."""
    model = recipe.model
    tables = tomllib.loads(dump(recipe))
    module = MODELING.removesuffix(".py")
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": f"{module}.{CONFIG_CLASS}",
            "AutoModelForCausalLM": f"{module}.{ARCHITECTURE}",
        },
        "recipe": {name: tables[name] for name in MODEL_SECTIONS if name in tables},
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "max_position_embeddings": model.max_length,
        "tie_word_embeddings": False,  # the decoder ties by itself
    }


def own_recipe(where: Path, config: Config) -> Recipe:
    """The recipe that `own_config` put into a `config.json`: the model, and nothing else that stands there.

    Raises UserError, RecipeError for a model that cannot be built.
    """
    tables = config.get("recipe")
    if not isinstance(tables, dict):
        raise UserError(f"{where}: 'recipe' is missing")
    model = {name: tables[name] for name in MODEL_SECTIONS if name in tables}
    try:
        return resolve({**model, "training": {"steps": 1}})
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def own_copies(shapes: Mapping[str, Index]) -> dict[str, list[Copy]]:
    """Every tensor is one of the directory's."""
    return {name: [whole(PREFIX + name, shape)] for name, shape in shapes.items()}


def float32_names(model: ModelRecipe) -> set[str]:
    """Tensors that stay float32 in every type of the model: decays, routers, buffers."""
    with torch.device("meta"):
        decoder = Decoder(model)
    names = {name for name, _ in decoder.named_buffers()}
    for path, module in decoder.named_modules():
        if traits(module).keep_fp32:
            names |= {f"{path}.{name}" for name, _ in module.named_parameters()}
    return names
