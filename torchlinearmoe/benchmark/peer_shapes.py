"""What the models of other trainers are built from. A recipe that asks for more would be timed beside another model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from torchlinearmoe.errors import UserError
from torchlinearmoe.families import FAMILIES
from torchlinearmoe.families.base import DIMENSIONS
from torchlinearmoe.recipe.schema import ModelRecipe

ALIKE = {
    *(f"model.{key}" for key in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_hidden_size")),
    *("model.vocab_size", "model.tie_embeddings", "model.norm_eps", "model.rope_theta"),
    *(f"moe.{key}" for key in ("num_experts", "top_k", "hidden_size", "shared_hidden_size", "renormalize")),
    "moe.first_dense_layers",
}
"""Keys that every peer's model takes from the recipe."""
NO_WORK = {
    *("model.max_length", "model.init_std", "model.norm_offset", "moe.shared_gate", "moe.routed_scaling"),
    *(f"model.{key}" for key in DIMENSIONS["model"] if key.startswith("rope_") or key.endswith("_scale")),
    *(f"model.{key}" for key in DIMENSIONS["model"] if key.endswith("_scales") or key.startswith("logit_")),
}
"""Keys whose value costs no time worth naming: peers may do without."""
ATTENTION = ("heads", "head_dim", "kv_heads", "window", "conv", "output_gate")
"""Options of softmax attention, all of them nothing, that no peer's model has."""


def refuse_other_shapes(recipe: ModelRecipe, peer: str, more: Collection[str] = ()) -> None:
    """Raise UserError for what the recipe's model has and that of `peer` has not.

    more: keys that it takes beside those of `ALIKE`.
    """
    attention = FAMILIES[recipe.family].attention
    sections: dict[str, Any] = {"model": recipe, "moe": recipe.moe}
    asked = [
        f"{section}.{key} = {value!r}"
        for section, values in sections.items()
        for key, plain in DIMENSIONS[section].items()
        if f"{section}.{key}" not in {*ALIKE, *NO_WORK, *more} and (value := getattr(values, key)) != plain
    ]
    if "model.head_dim" not in more and recipe.head_dim * recipe.num_heads == recipe.hidden_size:
        asked = [key for key in asked if not key.startswith("model.head_dim ")]
    if attention != "softmax_attention":
        asked.append(f"{attention} in its N layers")
    else:
        options = asdict(recipe.mixer_options[attention])
        asked += [f"mixer.{attention}.{key} = {options[key]!r}" for key in ATTENTION if options[key]]
    if asked:
        raise UserError(f"{peer} has no model of this shape ({', '.join(asked)}): leave it out of --contestants")
